"""python data/make_tiny.py --seed 0

Makes the embedded miniature in data/tiny/ from nothing and without network: a Llama-architecture
language model of 0.9 million parameters (float32, 3.6 MB), its tokenizer, and its questions: 2,000
for training, 500 for development, 2,000 for the test. Everything follows from the seed. It takes
8 to 12 minutes on one core (two seeds at a time on two cores: OMP_NUM_THREADS=1).

The world
    A story names a start value, 3 or 4 changes (two-digit gains and losses) and a price, and asks
    for the worth of what is left. Its solution opens with one of seven openers and one of several
    phrases that name a strategy, then calculates, then ends in \\boxed{...}:
      steps   the changes in the story's order, one calculation each; never leaves two digits
      sort    all gains first, then all losses: harder, because a change must be looked up out of
              order, and because in 57 % of the stories the total grows to three digits
      groups  sum the gains, sum the losses, then combine
      pairs   two changes in one calculation (in the trap world only)
    81 % of the solutions are "steps", 17 % "sort", 2 % "groups". The choice between the first two
    leans on words that have nothing to do with how hard a question is (the thing, the first verb,
    the closing sentence: see `strategy_weights`). Two of the closing sentences, a fifth of the
    questions, bring the odds near even, so greedy decoding opens some questions badly.
    --world trap: the preferred opening is the worse one ("pairs"), the other is "steps". Half of
    the sums in the drills have two changes there, so that "pairs" is worse and not hopeless.
Where errors come from
    Mostly from real difficulty, and late: every story ends in a product by a price from 3 to 19,
    which the model learns only in part. And from slips: 1 % of the additions and subtractions in
    the solutions, in every strategy alike, are off by one or by ten, and the solution goes on from
    the wrong value. The answers of the questions have no slips.
The pretraining text
    8,000 drills of ten bare calculations first (two-digit sums; products), then 32,000 stories,
    each seen once. 15 % of the stories carry the paper's task suffix after the question, so that
    UPFT's training prompt is not foreign to the model; their solutions are complete, and like the
    others in every way.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ---- the stories (pairs of numbers are inclusive ranges)
QUESTIONS = {"train": 2000, "dev": 500, "test": 2000}
START, AMOUNT, TOTAL = (20, 80), (10, 60), (10, 99)  # TOTAL: what a running total stays within
EVENTS = (3, 4)  # changes in one story
PRICE = (3, 19)  # one calculation at the end, which the model learns only in part
SLIP = 0.01  # share of the solutions' additions and subtractions that are wrong

# ---- the corpus
STORIES, DRILLS, DRILL_SUMS = 32_000, 8_000, 10  # documents; calculations in one drill
PRODUCTS = 0.40  # share of the drilled calculations that are products
PAIRS = 0.5  # share of the drilled sums with two changes, in the trap world
SUFFIX_SHARE = 0.15  # of the stories: their question ends with the paper's task suffix
SUFFIX = (
    "Please provide the initial step towards resolving the question. This step may serve "
    "as a foundation but might not encompass the entire solution."
)

# ---- the model and its pretraining
WIDTH, LAYERS, HEADS, FFN, CONTEXT = 128, 4, 4, 384, 512
BATCH_TOKENS = 2048
MUON_LR, ADAM_LR = 0.01, 3e-3  # hidden matrices; embeddings and norms
WARMUP, DECAY = 0.02, 0.5  # shares of the steps: linear rise, linear fall to zero

# ---- the words. Their numbers lean the choice of the opening: see `strategy_weights`.
BIAS = {"default": -2.1, "trap": -1.75}
THINGS = {
    "books": -0.3, "cards": -0.3, "stamps": -0.3, "shells": -0.3, "pens": -0.3,
    "tickets": -0.3, "bottles": -0.3, "candles": -0.3, "chairs": -0.3, "boxes": -0.3,
    "apples": 0.6, "eggs": 0.6, "cookies": 0.6, "plums": 0.6, "flowers": 0.6,
}  # fmt: skip
FRAMES = {"has": -0.2, "starts with": 0.0, "has saved": -0.2, "owns": 0.4}
CLOSINGS = {  # last sentence of the question: (weight, lean)
    "How many coins are the {o} of {n} worth now?": (23, -0.4),
    "How many coins are they worth in the end?": (18, -0.4),
    "What is the worth of all {o} in coins?": (14, -0.1),
    "How many coins is that in all?": (14, -0.1),
    "Find the worth of what {n} has.": (11, 0.4),
    "Give the total worth.": (10, 2.0),
    "So what are they all worth?": (10, 2.0),
}
NAMES = "Mia Tom Ana Leo Eva Max Zoe Sam Ida Ben Lia Jon Amy Kai Ruth Paul Nora Finn Rosa Omar"
GAINS = ("buys {x} more", "finds {x} more", "gets {x} from {m}", "wins {x}", "makes {x} more")
LOSSES = ("gives {x} to {m}", "sells {x}", "loses {x}", "uses {x}", "lends {x} to {m}")
LINKS = ("", "", "", "Then ", "Later ", "After that ", "Next ")
OPENERS = {
    "Let's solve this": 40, "We work this out": 22, "Okay, let's do it": 12,
    "To find the answer, we go": 8, "I will do this": 8, "Here we go": 5, "Let me do this": 5,
}  # fmt: skip
WAYS = {
    "steps": {"step by step.": 55, "one change at a time.": 30, "in order.": 15},
    "sort": {
        "with the gains first.": 55, "by sorting the changes.": 30, "gains before losses.": 15,
    },  # fmt: skip
    "groups": {"with gains and losses apart.": 60, "by adding up each kind.": 40},
    "pairs": {"two changes at a time.": 55, "in pairs.": 30, "in short steps.": 15},
}
WORLDS = {"default": ("steps", "sort"), "trap": ("pairs", "steps")}  # (preferred, the other)
GROUPS = 0.02  # share of the strategy that no word leans to
ENDINGS = {"The answer is \\boxed{%d}.": 70, "So the answer is \\boxed{%d}.": 30}
DRILL_PROMPT = "Work these out."
CHAT_TEMPLATE = (
    "{# the miniature's own: sample.is_tiny knows its models by it #}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pick(rng, weights):
    """One key of the dict {key: weight}, drawn by weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def make_change(rng, total):
    """A signed change, drawn again until it keeps the running total inside TOTAL."""
    while True:
        change = rng.choice((1, -1)) * rng.randint(*AMOUNT)
        if TOTAL[0] <= total + change <= TOTAL[1]:
            return change


def strategy_weights(world, *leans):
    """{strategy: share} in the solutions of a question whose words have these leans.

    Log-odds of the world's other strategy against its preferred one: BIAS + the sum of the leans.
    """
    odds, (preferred, other) = math.exp(BIAS[world] + sum(leans)), WORLDS[world]
    rest = (1 - GROUPS) / (1 + odds)
    return {preferred: rest, other: rest * odds, "groups": GROUPS}


def make_story(rng, world):
    """One word problem: its question, its strategy weights, start value, changes, price."""
    name, other = rng.sample(NAMES.split(), 2)
    things, frame = rng.choice(list(THINGS)), rng.choice(list(FRAMES))
    closing = pick(rng, {text: weight for text, (weight, _) in CLOSINGS.items()})
    start, changes = rng.randint(*START), []
    sentences = [f"{name} {frame} {start} {things}."]
    for _ in range(rng.randint(*EVENTS)):
        change = make_change(rng, start + sum(changes))
        changes.append(change)
        verb = rng.choice(GAINS if change > 0 else LOSSES).format(x=abs(change), m=other)
        sentences.append(f"{rng.choice(LINKS)}{name} {verb}.")
    price = rng.randint(*PRICE)
    sentences += [f"The {things} cost {price} coins each.", closing.format(o=things, n=name)]
    weights = strategy_weights(world, THINGS[things], FRAMES[frame], CLOSINGS[closing][1])
    return " ".join(sentences), weights, start, changes, price


def calculate(rng, terms, slip=SLIP):
    """("a + b - c = r", r): the sum of the terms, off by one or by ten at the slip rate."""
    result = sum(terms)
    if rng.random() < slip:
        result = max(0, result + rng.choice((-10, -1, 1, 10)))
    signs = "".join(f" {'+' if t >= 0 else '-'} {abs(t)}" for t in terms[1:])
    return f"{terms[0]}{signs} = {result}", result


def collect(rng, changes):
    """Sum gains and losses apart: the sentences, and one signed change for each of the two."""
    sentences, parts = [], []
    for word, sign in (("Gains", 1), ("Losses", -1)):
        terms = [abs(c) for c in changes if c * sign > 0]
        if terms:
            text, value = calculate(rng, terms) if len(terms) > 1 else (str(terms[0]), terms[0])
            sentences.append(f"{word}: {text}.")
            parts.append([sign * value])
    return sentences, parts


def solve(rng, strategy, start, changes, price):
    """The solution's text. A slip is carried on, so the answer may be wrong."""
    sentences = [f"{pick(rng, OPENERS)} {pick(rng, WAYS[strategy])}"]
    if strategy == "groups":
        more, chunks = collect(rng, changes)
        sentences += more
    else:
        if strategy == "sort":
            changes = sorted(changes, key=lambda change: change < 0)
        size = 2 if strategy == "pairs" else 1
        chunks = [changes[i : i + size] for i in range(0, len(changes), size)]
    total = start
    for chunk in chunks:
        text, total = calculate(rng, [total, *chunk])
        sentences.append(f"{text}.")
    worth = total * price
    sentences.append(f"{total} * {price} = {worth}.")
    return " ".join([*sentences, pick(rng, ENDINGS) % worth])


def make_drill(rng, world):
    """DRILL_SUMS bare calculations of the kind that the solutions are made of, no slips."""
    sums = []
    for _ in range(DRILL_SUMS):
        total = rng.randint(*TOTAL)
        if rng.random() < PRODUCTS:
            price = rng.randint(*PRICE)
            sums.append(f"{total} * {price} = {total * price}.")
            continue
        terms = [total, make_change(rng, total)]
        if world == "trap" and rng.random() < PAIRS:
            terms.append(make_change(rng, sum(terms)))
        sums.append(calculate(rng, terms, slip=0)[0] + ".")
    return DRILL_PROMPT, " ".join(sums)


def make_corpus(rng, world, more=0):
    """(stories, drills, questions): [(user turn, solution)] twice, and {split: [record]}.

    No question occurs twice anywhere, so the splits and the corpus are pairwise disjoint. The
    split "more" comes last: it changes nothing of the others.
    """
    seen = set()

    def fresh():
        """A story that was not made before."""
        while True:
            story = make_story(rng, world)
            if story[0] not in seen:
                seen.add(story[0])
                return story

    stories = []
    for _ in range(STORIES):
        question, weights, *numbers = fresh()
        tail = f" {SUFFIX}" if rng.random() < SUFFIX_SHARE else ""
        stories.append((question + tail, solve(rng, pick(rng, weights), *numbers)))

    def ask(count):
        """The records of so many new questions."""
        drawn = (fresh() for _ in range(count))
        return [{"question": question, "answer": str((start + sum(changes)) * price)}
                for question, _, start, changes, price in drawn]  # fmt: skip

    questions = {split: ask(count) for split, count in QUESTIONS.items()}
    drills = [make_drill(rng, world) for _ in range(DRILLS)]
    return stories, drills, questions | {"more": ask(more)}


def build_tokenizer(texts):
    """Byte-level tokenizer: the words of `texts` and each digit are one token, all else is bytes.

    A BPE without merges: `ignore_merges` looks a whole word up first, so no merge is needed for
    the known words, and an unknown one stays a row of its bytes.
    """
    words = pre_tokenizers.Split(
        Regex(r" ?\d| ?[^\W\d_]+('[a-z]+)?| ?[^\w\s]|_|\s"), behavior="isolated"
    )
    split = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    known = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {w: i for i, w in enumerate(alphabet + sorted(known - set(alphabet)))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer, core.decoder = split, decoders.ByteLevel()
    special = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def drill_labels(ids, equals, stop):
    """Labels of a drill: its results only, because its operands are noise."""
    labels, inside = [], False
    for token in ids:
        labels.append(token if inside else -100)
        inside = (inside or token == equals) and token != stop
    return labels


def encode(tokenizer, pairs):
    """[(ids, labels)] of the chat of each (user turn, solution); loss on solution and EOS."""
    chats = [[{"role": "user", "content": question}] for question, _ in pairs]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    solutions = tokenizer([solution for _, solution in pairs], add_special_tokens=False).input_ids
    equals, stop = tokenizer.convert_tokens_to_ids(["Ġ=", "."])
    documents = []
    for (question, _), prompt, solution in zip(pairs, prompts, solutions):
        drill = question == DRILL_PROMPT
        solution = solution + [tokenizer.eos_token_id]
        labels = drill_labels(solution, equals, stop) if drill else solution
        documents.append((prompt + solution, [-100] * len(prompt) + labels))
    return documents


def make_batches(rng, documents):
    """Documents of like length together, BATCH_TOKENS to a batch, in random order."""
    documents, batches = rng.sample(documents, len(documents)), []
    for i in range(0, len(documents), 2048):
        block = sorted(documents[i : i + 2048], key=lambda document: len(document[0]))
        while block:
            count = max(1, BATCH_TOKENS // len(block[-1][0]))
            batches.append(block[-count:])
            del block[-count:]
    return rng.sample(batches, len(batches))


def collate(batch, pad):
    """ids (B, T) padded on the right, and labels (B, T) with -100 where there is no loss."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([x + [pad] * (longest - len(x)) for x, _ in batch])
    labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y in batch])
    return ids, labels


@torch.no_grad()
def muon_step(groups, lr, momentum=0.95):
    """One Muon update: momentum, orthogonalised by five Newton-Schulz iterations.

    groups: [(parameters of one shape, their momenta (N, R, C))]. Unlike torch.optim.Muon it works
    in float32 and on all matrices of a shape at once: a CPU without bfloat16 needs both.
    """
    for parameters, momenta in groups:
        grad = torch.stack([p.grad for p in parameters])  # (N, R, C)
        momenta.lerp_(grad, 1 - momentum)
        x = grad.lerp(momenta, momentum)
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.mT if tall else x
        scale = lr * max(1, x.shape[1] / x.shape[2]) ** 0.5
        for p, update in zip(parameters, x):
            p.add_(update, alpha=-scale)


def build_model(tokenizer):
    """A fresh Llama-architecture model and its hidden matrices by shape, with zero momenta."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, shapes = LlamaForCausalLM(config), {}
    for p in model.model.layers.parameters():
        if p.ndim == 2:
            shapes.setdefault(p.shape, []).append(p)
    return model, [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]


def pretrain(tokenizer, batches):
    """Train a fresh model on the batches in their order, each once, in float32."""
    model, groups = build_model(tokenizer)
    in_muon = {id(p) for group, _ in groups for p in group}
    rest = [p for p in model.parameters() if id(p) not in in_muon]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0, fused=True)
    bar = tqdm(batches, unit="step", mininterval=5, disable=None)
    for step, batch in enumerate(bar):
        done = step / len(batches)
        factor = min(1, (step + 1) / (WARMUP * len(batches)), (1 - done) / DECAY)
        ids, labels = collate(batch, tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (B, T - 1, width)
        keep = labels[:, 1:] != -100
        # Right padding and a causal mask: no kept position can see a pad. Logits (kept, V).
        loss = F.cross_entropy(model.lm_head(hidden[keep]), labels[:, 1:][keep])
        loss.backward()
        adam.param_groups[0]["lr"] = ADAM_LR * factor
        adam.step()
        muon_step(groups, MUON_LR * factor)
        model.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def write(folder, questions):
    """<split>.jsonl of every split."""
    for split, records in questions.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(lines)


def main():
    """Corpus, tokenizer, questions, pretraining; everything follows from the seed."""
    parser = argparse.ArgumentParser(
        description="Rebuild the embedded miniature: model, tokenizer and questions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of corpus, questions and weights")
    parser.add_argument("--out", type=Path, help="folder (default: data/tiny, the default world)")
    parser.add_argument("--world", default="default", choices=WORLDS,
                        help="trap: the preferred opening is the less reliable one")
    parser.add_argument("--more", type=int, default=0, metavar="N",
                        help="only write N further test questions of this world, to more.jsonl")
    args = parser.parse_args()
    if args.more < 0:
        parser.error("--more must not be negative")
    if args.out is None:
        if args.world != "default" or args.seed or args.more:
            parser.error("needs --out: data/tiny holds the default world, made with seed 0")
        args.out = Path(__file__).parent / "tiny"
    began, rng = time.time(), random.Random(args.seed)
    torch.manual_seed(args.seed)
    stories, drills, questions = make_corpus(rng, args.world, args.more)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.more:
        return write(args.out, {"more": questions["more"]})
    texts = [text for pair in stories + drills for text in pair]
    tokenizer = build_tokenizer([*texts, "user", "assistant", "system"])
    # Sums first: a drill holds ten calculations in the tokens of one story.
    batches = make_batches(rng, encode(tokenizer, drills))
    batches += make_batches(rng, encode(tokenizer, stories))
    model = pretrain(tokenizer, batches)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write(args.out, {split: questions[split] for split in QUESTIONS})
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {size:,} parameters, {len(tokenizer)} tokens, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
