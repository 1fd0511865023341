"""data/prepare.py against an HTTP server on loopback: no network, files made here."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

GSM8K = [
    {"question": "How many?\u2028Count.", "answer": "Half is <<4/2=2>>2.\nSo 2.\n#### 2"},
    {"question": "How much?", "answer": "It costs \u20ac1,080.\n#### 1,080"},
    {"question": "How warm?", "answer": "The #### is text.\n#### -3"},
]
MATH = [
    {"problem": "Add $1$ to $\\pi$.", "solution": "$\\boxed{\\pi+1}$", "answer": "\\pi+1",
     "subject": "Algebra", "level": 3, "unique_id": "test/algebra/1.json"},
]
AIME = [
    {"id": 60, "question": "Find $m+n$.", "solution": "It is 25.", "answer": "025",
     "url": "https://artofproblemsolving.com/wiki/index.php/2024_AIME_I_Problems/Problem_1"},
]
SOURCES = {
    ("gsm8k", "train"): GSM8K, ("gsm8k", "test"): GSM8K[:2],
    ("math500", "test"): MATH, ("prm12k", "train"): MATH * 2, ("aime24", "test"): AIME,
}
OUTPUTS = sorted(f"{name}_{split}.jsonl" for name, split in SOURCES)


def jsonl(rows):
    # as GSM8K has it: U+2028 raw in the file, not escaped
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


class Handler(BaseHTTPRequestHandler):
    """Serves server.files and notes each request; server.fault chooses what goes wrong."""

    def do_GET(self):
        self.server.requests.append(self.path)
        fault, body = self.server.fault, self.server.files.get(self.path)
        if body is None or fault == "404":
            return self.send_error(404)
        if fault == "garbage":
            return self.wfile.write(b"this is not HTTP\r\n\r\n")
        self.send_response(200)
        if fault == "endless":
            return self.send_endless()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncated":
            body = body[: len(body) // 2]
        elif fault == "corrupted":
            body = body[:-5] + b"X" + body[-4:]  # one byte changed, same length
        elif fault == "slow":
            self.wfile.write(body[:10])
            self.server.stalled.set()
            self.server.released.wait(20)
            return None
        self.wfile.write(body)

    def send_endless(self):
        self.end_headers()
        try:
            for _ in range(64):
                self.wfile.write(bytes(2**20))
            self.server.sent_all = True
        except OSError:
            pass  # the client has had enough, as it should

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server that holds a small source for every set; the table points at it, sums included."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests = {}, []
    server.fault, server.sent_all = None, False
    server.stalled, server.released = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    files = []
    for file in prepare.FILES:
        rows = SOURCES[file["set"], file["split"]]
        body, path = jsonl(rows), f"/{file['set']}/{file['url'].rpartition('/')[2]}"
        server.files[path] = body
        files.append({**file, "url": server.url + path, "rows": len(rows), "bytes": len(body),
                      "sha256": hashlib.sha256(body).hexdigest()})
    monkeypatch.setattr(prepare, "FILES", files)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data"


def run(capsys, *argv):
    """Exit code, stdout and stderr of one call."""
    code = prepare.main([str(word) for word in argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def failure(capsys, *argv):
    """The error of a call that must fail with code 2, one line on stderr and no output."""
    code, printed, error = run(capsys, *argv)
    assert code == 2 and printed == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def in_folder(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- what is written -------------------------------------------------------------------------


def test_all_sets_are_written_and_printed(server, out, capsys):
    code, printed, error = run(capsys, "all", "--out", out)
    assert (code, error) == (0, "")
    assert in_folder(out) == sorted([prepare.RECORD, *OUTPUTS])
    assert len(server.requests) == 5
    lines = printed.strip().split("\n")
    assert len(lines) == 5
    for line, file in zip(lines, prepare.FILES):
        assert f"{file['set']}_{file['split']}.jsonl" in line
        assert f" {file['rows']} rows" in line and file["licence"] in line


def test_only_the_sets_asked_for(server, out, capsys):
    assert run(capsys, "math500", "aime24", "math500", "--out", out)[0] == 0
    assert in_folder(out) == sorted([prepare.RECORD, "math500_test.jsonl", "aime24_test.jsonl"])
    assert len(server.requests) == 2


def test_gsm8k_answer_is_bare_and_solution_is_the_rest(server, out, capsys):
    run(capsys, "gsm8k", "--out", out)
    rows = read(out / "gsm8k_train.jsonl")
    assert [row["answer"] for row in rows] == ["2", "1080", "-3"]
    assert [row["solution"] for row in rows] == [
        "Half is <<4/2=2>>2.\nSo 2.", "It costs \u20ac1,080.", "The #### is text."]


def test_line_separator_survives_and_no_reader_can_break_on_it(server, out, capsys):
    run(capsys, "gsm8k", "--out", out)
    assert read(out / "gsm8k_train.jsonl")[0]["question"] == "How many?\u2028Count."
    text = (out / "gsm8k_train.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 3  # splitlines would cut at a raw U+2028


def test_math_and_aime_columns(server, out, capsys):
    run(capsys, "math500", "prm12k", "aime24", "--out", out)
    assert read(out / "math500_test.jsonl") == [{
        "question": "Add $1$ to $\\pi$.", "answer": "\\pi+1", "solution": "$\\boxed{\\pi+1}$",
        "level": "3", "subject": "Algebra", "id": "test/algebra/1.json"}]
    assert len(read(out / "prm12k_train.jsonl")) == 2
    assert read(out / "aime24_test.jsonl") == [{
        "question": "Find $m+n$.", "answer": "025", "solution": "It is 25.",
        "id": "2024_AIME_I_Problems/Problem_1"}]


# ---- a second run ----------------------------------------------------------------------------


def test_second_run_makes_no_request(server, out, capsys):
    run(capsys, "all", "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    server.requests.clear()
    code, printed, _ = run(capsys, "all", "--out", out)
    assert code == 0 and server.requests == []
    assert printed.count("already there") == 5 and "2 rows" in printed
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def cut(out):
    path = out / "gsm8k_train.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def edit(out):
    path = out / "gsm8k_train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"1080", b"1081"))


def repin(out):
    record = json.loads((out / prepare.RECORD).read_text())
    record["gsm8k_train.jsonl"][0] = "0" * 64  # as if an older table had made it
    (out / prepare.RECORD).write_text(json.dumps(record))


def damage(out):
    (out / prepare.RECORD).write_text('{"gsm8k_train.jsonl": [')


def empty(out):
    (out / prepare.RECORD).write_text("null")


@pytest.mark.parametrize("harm", [cut, edit, repin, damage, empty])
def test_an_output_that_is_not_what_we_wrote_is_made_again(server, out, capsys, harm):
    run(capsys, "gsm8k", "--out", out)
    good = (out / "gsm8k_train.jsonl").read_bytes()
    harm(out)
    server.requests.clear()
    assert run(capsys, "gsm8k", "--out", out)[0] == 0
    assert "/gsm8k/train.jsonl" in server.requests
    assert (out / "gsm8k_train.jsonl").read_bytes() == good


# ---- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("fault, words", [
    ("truncated", "cut short"), ("corrupted", "wrong checksum"), ("endless", "more than"),
    ("404", "404"), ("garbage", "this is not HTTP"),
])
def test_a_bad_download_is_one_line_and_leaves_nothing(server, out, capsys, fault, words):
    server.fault = fault
    error = failure(capsys, "gsm8k", "--out", out)
    assert words in error and server.url in error
    assert "--from DIR_OR_URL" in error and "gsm8k/train.jsonl" in error
    assert in_folder(out) == [] and not server.sent_all


def test_a_bad_download_keeps_what_was_there(server, out, capsys):
    run(capsys, "gsm8k", "--out", out)
    edit(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    server.fault = "corrupted"
    failure(capsys, "gsm8k", "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_refused_connection(server, out, capsys):
    server.shutdown()
    server.server_close()
    error = failure(capsys, "aime24", "--out", out)
    assert "refused" in error and "--from DIR_OR_URL" in error and in_folder(out) == []


def test_a_silent_server_times_out(server, out, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.1)
    server.fault = "slow"
    error = failure(capsys, "aime24", "--out", out)
    assert "timed out" in error and in_folder(out) == []


def test_unknown_set_is_refused_before_any_download(server, out, capsys):
    error = failure(capsys, "aime24", "gsm9k", "--out", out)
    assert "gsm9k" in error and "gsm8k, math500, prm12k, aime24" in error
    assert "--from DIR_OR_URL" in error
    assert server.requests == [] and in_folder(out) == []


def test_a_folder_that_cannot_be_written(server, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    error = failure(capsys, "aime24", "--out", tmp_path / "file")
    assert "--out" in error and str(tmp_path / "file") in error


def test_wrong_row_count(server, out, capsys, monkeypatch):
    files = [{**file, "rows": file["rows"] + 1} for file in prepare.FILES]
    monkeypatch.setattr(prepare, "FILES", files)
    assert "1 rows instead of 2" in failure(capsys, "aime24", "--out", out)
    assert in_folder(out) == []


def test_a_disk_that_fails_while_writing(server, out, capsys, monkeypatch):
    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in failure(capsys, "aime24", "--out", out)
    assert in_folder(out) == []


def test_ctrl_c_while_downloading(server, out, tmp_path):
    """A real SIGINT to a real process that is in the middle of a body."""
    server.fault = "slow"
    code = (
        # A background job of a shell starts with SIGINT ignored, and hands that on.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; sys.path.insert(0, sys.argv[1]); import prepare\n"
        "for file in prepare.FILES: file['url'] = sys.argv[2]\n"
        "sys.exit(prepare.main(['aime24', '--out', sys.argv[3]]))"
    )
    url = server.url + "/aime24/test.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(SCRIPT.parent), url, str(out)],
        env={**os.environ, "no_proxy": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    try:
        assert server.stalled.wait(20)
        time.sleep(0.1)  # let the client enter its read
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.startswith("stopped") and error.count("\n") == 1
    assert in_folder(out) == []


# ---- --from ----------------------------------------------------------------------------------


def test_from_a_folder_needs_no_request_and_checks_the_sums(server, out, tmp_path, capsys):
    local = tmp_path / "my sources"  # a space: the path becomes a URL on the way
    for path, body in server.files.items():
        (local / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (local / path[1:]).write_bytes(body)
    assert run(capsys, "all", "--from", local, "--out", out)[0] == 0
    assert server.requests == [] and len(in_folder(out)) == 6

    with open(local / "gsm8k" / "train.jsonl", "r+b") as file:
        file.write(b"[")
    (out / "gsm8k_train.jsonl").unlink()
    error = failure(capsys, "gsm8k", "--from", local, "--out", out)
    assert "wrong checksum" in error and not (out / "gsm8k_train.jsonl").exists()


def test_from_a_folder_without_the_file(server, out, tmp_path, capsys):
    error = failure(capsys, "gsm8k", "--from", tmp_path, "--out", out)
    assert "No such file" in error and "gsm8k/train.jsonl" in error
    assert server.requests == [] and in_folder(out) == []


def test_from_a_url(server, out, capsys):
    server.files = {"/mirror" + path: body for path, body in server.files.items()}
    assert run(capsys, "gsm8k", "--from", server.url + "/mirror/", "--out", out)[0] == 0
    assert server.requests == ["/mirror/gsm8k/train.jsonl", "/mirror/gsm8k/test.jsonl"]
    server.fault = "corrupted"
    assert "wrong checksum" in failure(
        capsys, "aime24", "--from", server.url + "/mirror", "--out", out)


@pytest.mark.parametrize("source", ["http://[bad", "gopher://nowhere", "http://127.0.0.1:x/"])
def test_from_something_that_is_no_url(server, out, capsys, source):
    assert "cannot read" in failure(capsys, "aime24", "--from", source, "--out", out)


# ---- the table itself ------------------------------------------------------------------------


def test_every_pin_is_complete():
    assert sorted(f"{file['set']}_{file['split']}.jsonl" for file in prepare.FILES) == OUTPUTS
    for file in prepare.FILES:
        assert len(bytes.fromhex(file["sha256"])) == 32
        assert any(len(part) == 40 and bytes.fromhex(part) for part in file["url"].split("/"))
        assert file["url"].startswith("https://")
    layouts = [prepare.layout(file) for file in prepare.FILES]
    assert len(set(layouts)) == len(layouts)  # --from could not tell two files apart
