"""Ask a model, extract its answers, decide which are right, and say how sure the score is.

    python evaluate.py --model data/tiny --data tiny --out predictions.jsonl
    python evaluate.py --model M --data gsm8k --out p.jsonl --n 8 --temperature 0.6
    python evaluate.py --regrade p.jsonl
    python evaluate.py --compare base.jsonl tuned.jsonl
"""

import ast
import hashlib
import re
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import comb, sqrt
from operator import add, mul, neg, pos, sub
from pathlib import Path

import numpy as np

import sample
from sample import InputError, model_parser

# ------------------------------------------------------------------ 1. extraction
# From a whole completion to the words that state its final answer.

BOX_OR_BRACE = re.compile(r"(?:boxed|fbox)\s*\{|\\(?!boxed|fbox).|[{}]", re.S)
BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s+|(?=\d))(?!\{|[A-Za-z]{2})([^\s$]+)")
HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(?![*_]*(?:[A-Za-z]{2}|\d+[.):][ \t]+\S))(\S[^\n]*)",
                    re.M)
PHRASE = re.compile(
    r"(?i)(?:\bans(?:wer)?\b|\b(?:option|choice)(?=\s+is\b)|答案)"
    r"(?:(?!, (?:we|I)\b(?! \w+,))[^.\n:=]){0,60}?"
    r"(?:\b(?:is|was|would be|equals)\b|[:：是为]|=>?)"
    r"(?:\s*(?:therefore|thus|simply|just|equal to|given by|option|choice)\b)?[\s:*_,]*")
NUMBER = re.compile(
    r"(?:(?<![\w)\]}$])-|(?<!-)\bnegative )?(?:\\?[$€£]\s?)?(?<![\d.])-?"
    r"(?:\d*\\[dtc]?frac\s*\{-?\d+\}\s*\{\d+\}"
    r"|\d+:\d\d\b|\d+ \d+/\d+|(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}\b)?(?:/\d+)?)(?:\s?\\?%|\s(?:thousand|million|billion|trillion)\b)?")
FORMULA = re.compile(r"\$\$?((?:\\.|[^$\\])+?)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
NOTES = re.compile(r"<<[^<>\n]*>>|</?s>|<\|\w*\|>")      # GSM8K's calculator, special tokens
NOT_ANSWERS = "correct right wrong incorrect not the a as to clear that".split()


def extract_answer(text: str) -> str | None:
    r"""Return the final answer that `text` states, as written, or None if it states none.

    In this order: the last complete \boxed{...} or \fbox{...} (nested braces count, and of several
    the last alone, as MATH's own answers have it); the last "#### x"; the last "the answer is x"
    or its like; the last number; words after "the answer is".
    A box that the length limit left open is not an answer, for "\boxed{12" may have been going to
    be 120: what stands before it decides. Where the text goes on after an open box only a brace was
    forgotten, and the box is read up to the end of its formula or line.
    """
    text = NOTES.sub("", text.translate(UNICODE))
    boxed, text = find_boxed(text)
    hashes = HASHES.findall(text)
    if boxed or hashes:
        return boxed or read_statement(hashes[-1][:300]) or hashes[-1].strip()
    words = None
    for match in reversed(list(PHRASE.finditer(text))[-20:]):
        rest = re.sub(r"\*\*|__|`", "", text[match.end():match.end() + 300]).strip()
        if "\n" in match[0] and re.match(r"1[.)][ \t]+\S", rest):
            continue                                    # "Answer:", and then a list of steps
        if answer := read_statement(rest):
            return answer
        few = re.match(r"\$?([A-Za-z]+)((?: [A-Za-z]+){0,2})\$?\s*(?:[.\n,;!]|$)", rest)
        if few and few[1].lower() not in NOT_ANSWERS:
            words = words or few[1] + few[2]            # "The answer is Tuesday."
    return last_number(text) or words


def find_boxed(text: str) -> tuple[str | None, str]:
    """Return the last complete box's content (or None), and the text before an unfinished box."""
    stack, at, content = [], 0, None
    for token in BOX_OR_BRACE.finditer(text):
        if token[0] == "}":
            box = stack.pop() if stack else None
            if box and (inside := text[box.end():token.start()].strip()):
                at, content = box.end(), inside
        elif token[0][0] != "\\":
            stack.append(token if token[0] != "{" else None)
    for bare in BARE_BOX.finditer(text, at):
        content = bare[1].rstrip(".,;")
    opened = next(filter(None, stack), None)
    if content or not opened:
        return content, text
    line = re.match(r"([^$\n]*[^$\n\s.*])[.*\s]*[$\n]", text[opened.end():].lstrip())
    return (line[1], text) if line else (None, text[:opened.start()].rstrip("\\"))


def read_statement(rest: str) -> str | None:
    """Return the answer that opens `rest`, the text after "the answer is"; None if there is none.

    A sentence without words is the answer; one with words ("$18 per day.", "5 apples") holds it
    as its first choice letter, formula or number.
    """
    rest = rest.lstrip("} ")                            # of \textbf{Answer:} 18
    sentence = re.split(r"\.(?=\s|$)|\n|\b(?:because|since)\b", rest, maxsplit=1)[0].strip()
    if not re.search(r"[(\[{]", sentence):              # (The answer is 18.)
        sentence = sentence.rstrip(")]}. ")
    sentence = re.sub(r"(?<=\d)(?:!+| \((?:\d[^()]*\)?)?)$", "", sentence)     # 18! or 18 (9*2)
    if re.search(r"\w", sentence) and not has_words(sentence):
        return result(sentence) or None
    if choice := re.match(r"\(?([A-J])\)?(?![\w'])(?! ?[a-z=+/^]| \*|\*\w)", sentence):
        return choice[1]
    for formula in FORMULA.finditer(rest):
        inside, in_sentence = formula[formula.lastindex], formula.end() <= len(sentence)
        first = formula.start() == 0
        if (first or "\\" in inside and in_sentence) and not has_words(inside):
            return result(inside)
    number = NUMBER.search(sentence, sentence.rfind("=") + 1) or NUMBER.search(sentence)
    return result(number[0]) if number else None


def last_number(text: str) -> str | None:
    """Return the last number, or the formula around it if that holds a LaTeX command."""
    number = next(reversed(list(NUMBER.finditer(text))), None)
    if not number:
        return None
    for formula in FORMULA.finditer(text, max(0, number.start() - 200), number.end() + 200):
        inside = formula[formula.lastindex]
        around = formula.start() <= number.start() < formula.end()
        if around and "\\" in inside and not has_words(inside):
            return result(inside)
    return result(number[0])


def result(formula: str) -> str:
    """Return a formula without currency and full stop; of "2 + 3 = 5" only the result."""
    formula = re.sub(r"^(?:[\s*]|\\\[)+|(?:[\s.,*$]|\\\])+$|(?<!\\)\\[()]|\\?[$€£]", "", formula)
    has_letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", formula))
    return formula.strip() if has_letters else formula.rpartition("=")[2].strip()


def has_words(text: str) -> bool:
    """Tell whether plain words stand in `text`, other than LaTeX, functions, "and" and "or"."""
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    return any(is_word(w) for w in re.findall(r"[A-Za-z]+", text) if w not in ("and", "or"))


def is_word(letters: str) -> bool:
    """Tell a word from a product of variables or a Roman number."""
    return ((len(letters) > 2 or letters in SHORT_WORDS) and letters not in FUNCTION.split("|")
            and not re.fullmatch("[IVX]+", letters))


# ------------------------------------------------------------------ 2. normalisation
# One spelling for one meaning: what models write in many ways is written in one.

FUNCTION = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|sqrt"
SHORT_WORDS = ("no of in is to by on at an it we sq mm cm dm km kg mg ml mL mi ft yd oz lb hr am"
               " pm AM PM").split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
MONTHS = ("january february march april may june july august september october november"
          " december").split()
POWERS = {"thousand": "03", "million": "06", "billion": "09", "trillion": "012"}
UNICODE = str.maketrans(dict(zip("−–÷⁄²³₀₁₂₃₄₅₆₇₈₉，（）。％\u00a0\u202f\u2009", (
    *"--//", "^2", "^3", *(f"_{digit}" for digit in range(10)), *",().%   "))) | {
    character: f"\\{command} " for character, command in zip("×·⋅√π∞∪∈≤≥≠≈±∅θ½¼¾⅓⅔", (
        "times cdot cdot sqrt pi infty cup in le ge ne approx pm emptyset theta"
        " frac{1}{2} frac{1}{4} frac{3}{4} frac{1}{3} frac{2}{3}").split())} | {
    "—": " - ", "°": r"^\circ ", "ℝ": "R"})
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<!\\)\\!(?:(?<=,\\!)\s+(?=\d{3}))?|\{,\}(?=\d{3})", ""),      # 10,\! 000 and 10{,}000
    (r"(?<!\\)\\(?:[,;: ]|q?quad\b|displaystyle\b|phantom\s*(?:\{[^{}]*\}|-))|~", " "),
    (r"(?i)\bnegative (?=[\d\\.])", "-"), (r"(?i)\b([ap])\.m\b\.?", r"\1m"),
    # 0.1\overline{6} = 0.1 + 6/90
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", lambda m: "({}.{}+{}/{})".format(
        m[1] or 0, m[2] or 0, m[3], 10**len(m[2]) * (10**len(m[3]) - 1))),
    (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
    (r"^\s*(?:\\[(\[]|\*\*)|(?:\\[)\]]|\*\*)\s*$|`|\\?\$|[€£¥]", ""),
    (r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1"), (r"\\varnothing", r"\\emptyset"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\colon\b", ":"), (r"\\([gln]e)q(?:slant|q)?\b", r"\\\1 "),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"\\lt\b", "<"), (r"\\gt\b", ">"),
    (r"\^?\s*(?:\\degree|\\circ|\{\s*\\circ\s*\})(?:\s*[CF]\b)?", ""),
    (r"\s{3,}", "  "),                                  # long runs would cost n^4 in the next
    # 5th, 5^{\text{th}}
    (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mbox|mathrm)\s*\{)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}", ""),
    (r"\\(?:math(?:bf|it|cal|sf|bb)|operatorname|boldsymbol|mathrm(?=\s*\{[ied]\}))\s*"
     r"(?:\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\})?", r"\1"),
    (r"(?<![A-Za-z\\])(arc(?:sin|cos|tan)|sin|cos|tan|log|ln|sqrt|pi)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![A-Za-z\\])[Ii]nf(?:ty|inity)?(?![A-Za-z])", r"\\infty "),
    (r"(?i)\\?%|(?:\\text\{\s*)?\bper\s?cent(?:age)?(?: points?)?\b(?:\s*\})?", "%"),
    (r"(?i)\ball real numbers\b|\(-\\infty\s*,\s*\+?\s*\\infty\s*\)", "R"),
    (r"(\d)\s*[eE]([+-]?\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2}"),
    (r"(?<![\d.^_])(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1+\\frac{\2}{\3})"),     # 11 1/2
    (r"(?<![\w.^}])(\d+)\s*(\\frac\s*(?:\d\s*\d|\{\s*\d+\s*\}\s*\{\s*\d+\s*\}))", r"(\1+\2)"),
    (r"(?<=\d) (?=\d{3}(?: \d{3})*(?![\d.]))(?<!\d{4} )", ""))]             # 10 000
WORD = re.compile(r"\\(?:text(?!su[bp])[a-z]*|[mh]box|mathrm|emph)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
                  r"|(?<![\\A-Za-z\d{}_'])[A-Za-z][A-Za-z']+\.?"
                  r"|(?<=\d)(?:[A-Za-z]{4,}|[kcm]m|kg|mph|ft|hrs?|[ap]m)\b"
                  r"|(?<![\\\w{}'^])(?<![-+*/=] )a(?= (?!and\b|or\b)[a-z]{2})")      # 18 a day
QUOTED = re.compile(r'[/"]*"([^"]*)"(?:\s*\^\s*(?:\{[^{}]*\}|-?\d))?')


@lru_cache(maxsize=10_000)
def clean(answer: str) -> str:
    r"""Return `answer` in one spelling, without units, words of explanation and decoration.

    Words go where anything else is left ("5 apples" -> "5"), and stay where nothing is
    ("\text{Evelyn}" -> "Evelyn"); "and" and "or" become commas, a percent sign stays as "%".
    """
    text = answer.translate(UNICODE)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    text = WORD.sub(quote_word, text)
    bare = re.sub(r"\\frac\s*\{\s*\}\s*\{\s*\}|_\s*\{\s*\}|\(\s*\)", " ", QUOTED.sub(" ", text))
    words = re.sub(r"(?i)^(?:an?|the) (?=[a-z])", "", " ".join(text.replace('"', " ").split()))
    number = words.lower() in NUMBER_WORDS and str(NUMBER_WORDS.index(words.lower()))
    # An article or a Roman number beside words is no answer without them.
    keep = re.search(r"[A-Za-z0-9]", bare) and not re.fullmatch("an?|[IVX]{3,}", bare.strip())
    text = bare if keep else number or words
    text = re.sub(r"^[\s=:,;]+|(?:[\s=:,;.*/?]|\\cdot|\\times)+$", "", text)
    return "" if re.fullmatch(r"[\s{}()\[\]]*", text) else text


def quote_word(match: re.Match) -> str:
    r"""Return a word or a \text{...} in quotes; "and" as a comma, "million" as a power of ten."""
    word = (match[0] if match[1] is None else match[1]).strip()
    lower = word.lower().strip(".,")
    if lower in ("and", "or"):
        return " , "
    if lower in POWERS:
        return rf"\cdot 10^{{{POWERS[lower]}}}"          # "06": LOOSER knows by it a word was here
    if match[1] and re.search(r"[\d,(]|\b(?:and|or|[Oo]ption|[Cc]hoice)\b", word):
        return WORD.sub(quote_word, f" {word} ")         # \text{October 30}, \text{Option B}
    keep = match[1] is None and word != "a" and (
        lower in MONTHS or not is_word(word.strip(".")))
    return match[0] if keep else f' "{word}" '


# ------------------------------------------------------------------ 3. the value of an expression
# Two formulas are the same if they agree at random points (Schwartz 1980, Zippel 1979). That needs
# no algebra, only exact arithmetic: with fractions nothing is rounded, and with powers and roots
# modulo a 70-bit prime nothing can explode. Every letter stands for a random number. The prime is
# 3 modulo 4, and all primes below 127 are squares, so that a^((PRIME + 1) / 4) is the root of a:
# sqrt(12) = 2 sqrt(3).

PRIME = 809986004571666292751
ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\\[a-z]+|\w))"
TO_PYTHON = [(re.compile(pattern), new) for pattern, new in (       # innermost braces first
    (r"\\frac" + ARGUMENT + ARGUMENT, r"((\1\2)/(\3\4))"),
    (r"\\sqrt\s*\[\s*(\d+)\s*\]" + ARGUMENT, r" root_\1(\2\3)"),
    (r"\\sqrt\s*(?:\{([^{}]*)\}|(\\[a-z]+|\d+|[a-z]))", r" root_2(\1\2)"),
    (r"\\sqrt\s*(?=\()", " root_2"), (r"_\s*\{\s*(\w+)\s*\}", r"_\1 "),
    (r"\^\s*\{([^{}]*)\}", r"**(\1)"), (r"\{([^{}]*)\}", r"(\1)"),
    (r"\\(?:cdot|times)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"), (r"\^", "**"))]
CALL = re.compile(rf"\\({FUNCTION})(_\w+)?\s*(?:\*\*\(?(-?\w)\)?)?\s*"
                  rf"((?:\w|\\(?!{FUNCTION})[a-z]+|\*\*(?:\w|\(-?\w+\)))+|(?=\())")
TOKEN = re.compile(r"(?:\d+|\\?[^\W\d_]+)_\w+|\\?[^\W\d_]+|(\d+\.?\d*|\.\d+)")
ARITHMETIC = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: Fraction,
              ast.UAdd: pos, ast.USub: neg}


@lru_cache(maxsize=10_000)
def expression(text: str) -> tuple:
    """Return the values of a LaTeX or plain expression at two points; ValueError if it is none.

    Expressions that agree by arithmetic have equal values, others differ, but for a chance of some
    2^-70. What functions obey beyond that is not known (ln 4 is not 2 ln 2; nor fifth roots, and
    that i^2 is -1), and a name before a bracket is a factor, unless it is a known function, f or g.
    """
    if re.search(r"\\(?:[dt]?binom|dot)(?![a-z])|\.\\(?:overline|bar)", text):
        raise ValueError("a command that is no factor")
    # The first rule that fits is applied, and again from the top, until none does.
    while rule := next((rule for rule in TO_PYTHON if rule[0].search(text)), None):
        text = rule[0].sub(rule[1], text)
    text = CALL.sub(lambda m: f" call_{m[1]}{m[2] or ''}_{(m[3] or '').replace('-', 'm')}"
                              + (f"({m[4]})" if m[4] else ""), text)
    text = re.sub(r"(?<![A-Za-z\\])([fg])\s*(?=\()", r" call_\1_", text)      # f(2x) is not 2f(x)
    source = " ".join(TOKEN.sub(python_token, text).split())
    if re.search(r"\) ?\(\d", source):
        raise ValueError("a number right after a value")
    source = re.sub(r"\) ?(?=\(|root_|call_)", ")*", source)        # a product: 2x
    tree = ast.parse(source, mode="eval").body
    return "value", *(modulo(value_at(tree, point)) for point in (0, 1))


def python_token(match: re.Match) -> str:
    """Return a number or a name as Python has it, in parentheses: 0.5 -> (1/2), x -> (v_x)."""
    token, number = match[0], match[1]
    if token.startswith(("root_", "call_")):
        return token
    if number:
        return f"({Fraction(number)})"
    product = token[0].islower() and len(token) == 2                # xy is x times y
    return "".join(f"(v_{name})" for name in (token if product else [token.lstrip("\\")]))


def value_at(node: ast.AST, point: int) -> int | Fraction:
    """Return the value of a syntax tree at a random point; nothing is executed.

    Powers and roots are taken modulo PRIME, all else is exact: an exponent needs that.
    """
    match node:
        case ast.Constant(value=int(n)):
            return n
        case ast.Name(id=name):
            return random_number(name if len(name) < 5 else name.lower(), point)
        case ast.UnaryOp(op=op, operand=inside) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](value_at(inside, point))
        case ast.Call(func=ast.Name(id=name), args=[inside]):
            inside = modulo(value_at(inside, point))
            if name.startswith("root_"):
                return power(inside, Fraction(1, int(name[5:])), point)
            return random_number((name, inside), point)             # sin of equals is equal
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return power(modulo(value_at(left, point)), value_at(right, point), point)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](value_at(left, point), value_at(right, point))
    raise ValueError("not an expression")


def modulo(value: int | Fraction) -> int:
    """Return the integer modulo PRIME that stands for a number."""
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME


def random_number(name, point: int) -> int:
    """Return the number that stands for a letter, pi or sin(...) at this point."""
    number = int.from_bytes(hashlib.sha256(repr((name, point)).encode()).digest(), "big")
    # Squares at one point and never squares at the other, so that sqrt(x^2) is not x.
    return number**2 % PRIME * (1, -1)[point] % PRIME


def power(base: int, exponent: int | Fraction, point: int) -> int:
    """Return base to a power modulo PRIME, with i as the root of what has none."""
    if max(abs(exponent.numerator), exponent.denominator) > 2**32:      # a letter, or huge
        return random_number((base, modulo(exponent)), point)
    whole = pow(base, int(exponent), PRIME)             # x^{3/2} is x sqrt(x)
    degree = exponent.denominator
    while degree % 2 == 0:
        root = pow(base, (PRIME + 1) // 4, PRIME)       # of base, or of -base
        base = root if root * root % PRIME == base else root * random_number("v_i", point) % PRIME
        degree //= 2
    rest = (exponent - int(exponent)).numerator * pow(degree, -1, PRIME - 1)
    return whole * pow(base, rest, PRIME) % PRIME


# ------------------------------------------------------------------ 4. comparing answers

RELATION = r"=|<|>|\\(?:le|ge|ne|in|to|equiv)(?![a-zA-Z])"
FLIPPED = {">": "<", r"\ge": r"\le"}
MATRIX = re.compile(r"[(\[]?\s*\\begin\{([bp]?matrix|array)\}(?:\{[^}]*\})?((?:(?!\\begin).)*)"
                    r"\\end\{\1\}\s*[)\]]?", re.S)
THOUSANDS = re.compile(r"(?<![\d,.])(\d{1,3}(?:,\d{3})+)(?![\d,]\d)")
LOOSER = [(re.compile(pattern, re.S), new) for pattern, new in (   # further readings of an answer
    (r"(-?[\dA-F]+)_\{?\w+\}?", r"\1"),                  # 2516_8 where the base goes without saying
    (r"(\d+):00", r"\1"),                                # three o'clock
    # 12 m: metres, not 12 times m; of km/h quote_word took the km
    (r"(-?[\d.,]+)(?: +(?:sec|[GM]B|[mgLsh])(?:\^\{?[23]\}?)?)?(?: +/ ?[smh])?", r"\1"),
    (r"(.*)\\cdot 10\^\{0\d+\}", r"\1"),                # 4 million, of a question in millions
    (r"(.*)\\approx.*", r"\1"), (r".*\\approx(.*)", r"\1"),
    (r"\(?([A-J])(?:\)[.:]?|[.:])\s*\S.*", r"\1"),       # a choice with its text: "(C) 12"
    (r"([^()\[\]]*,.*)", r"(\1)"),                       # a list in the order of the tuple
    (r"(.*)%", r"(\1)/100"))]


def is_correct(prediction: str | None, gold: str) -> bool:
    """Tell whether an extracted answer equals the gold answer, as written or as a number.

    No tolerance: decimals are rationals, and 0.33 is not 1/3. Tuples and intervals are ordered,
    with their brackets; sets and lists are not ordered. What one side leaves open may be filled in
    by the other ("5" for "x = 5", "2516" for "2516_8", "1, 2" for "(1, 2)"), but two sides that
    both say it have to agree. Units are dropped on both. A percent sign on one side only is
    read as a unit or as 1/100: both "10" and "0.1" are right where "10%" is, since models answer
    with either, and common graders drop the sign. Form is not graded: (x+1)^2 is right where its
    expansion is asked for. None and "" are never right.
    """
    prediction = prediction or ""
    halves = [set(re.findall(r"(?<![a-z\\])([ap])\.?m\b", s.lower())) for s in (prediction, gold)]
    if all(halves) and halves[0] != halves[1]:          # 8 a.m. and 8 p.m.
        return False
    if max(len(prediction), len(gold)) > 600:            # too deep for Python's parser and stack
        return squeeze(prediction) == squeeze(gold) != ""
    prediction, gold = clean(prediction), clean(gold)
    if "%" in prediction and "%" in gold:
        prediction, gold = prediction.replace("%", ""), gold.replace("%", "")
    if not prediction or not gold or prediction == gold:
        return prediction == gold != ""
    if re.fullmatch(r"-?\d+,-?\d+", f"{prediction},{gold}"):                # most of GSM8K
        return int(prediction) == int(gold)
    strict_p, strict_g = readings(prediction, False), readings(gold, False)
    return bool(strict_p & strict_g or strict_p & readings(gold, True)
                or readings(prediction, True) & strict_g)


def readings(text: str, loose: bool) -> set:
    """Return the canonical forms of a cleaned answer, read as it is or with good will."""
    forms = {text.replace("%", "")}
    if loose:
        forms |= {pattern.sub(new, text) for pattern, new in LOOSER if pattern.fullmatch(text)}
    if text[0] not in "([":
        forms |= {THOUSANDS.sub(lambda m: m[0].replace(",", ""), form) for form in forms}
    return {canonical(form, loose) for form in forms if form.strip()}


def canonical(text: str, loose: bool) -> tuple:
    r"""Return a nested tuple that two answers share if they mean the same.

    `loose` drops what names the answer ("x =", "x \in") and reads x > 3 as (3, \infty).
    """
    text = text.strip()
    for separator in (r"[,;]", r"\\cup(?![a-zA-Z])", ":", RELATION):
        parts = split_top(text, separator)
        if len(parts) > 1:
            items = [canonical(part, loose) for part in parts[::2] if part.strip()]
            if separator == RELATION:
                return relation(parts[::2], items, parts[1::2], loose)
            return ("ratio", *items) if separator == ":" else unordered(items)
    inside = enclosed(text)
    if inside is not None and (text[0] == "\\" or len(split_top(inside, ",")) > 1):
        if text[0] in "\\{":                             # a set is a list
            return canonical(inside if inside.strip() else r"\emptyset", loose)
        items = [canonical(item, loose) for item in split_top(inside, ",")[::2]]
        return text[0], text[-1], *items
    if r"\pm" in text:
        return unordered([canonical(text.replace(r"\pm", sign), loose) for sign in "+-"])
    if matrix := MATRIX.fullmatch(text):
        return "matrix", *(tuple(canonical(cell, loose) for cell in row.split("&"))
                           for row in re.split(r"\\\\(?:\[\w+\])?", matrix[2]) if row.strip())
    try:
        return expression(text)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return "text", squeeze(text)


def relation(parts: list[str], sides: list[tuple], signs: list[str], loose: bool) -> tuple:
    """Return the canonical form of an equation, an inequality or a membership."""
    names = [is_name(part) for part in parts]
    if sides and set(signs) <= {"=", r"\in"} and (loose and names[0] or len(set(sides)) == 1):
        return sides[-1]
    if signs[0] in FLIPPED:
        sides, names, signs = sides[::-1], names[::-1], [FLIPPED.get(s, s) for s in signs[::-1]]
    if set(signs) <= {"<", r"\le"} and sum(names) == 1:
        low = canonical(r"-\infty", False) if names[0] else sides[0]
        high = canonical(r"\infty", False) if names[-1] else sides[-1]
        interval = ("(" if names[0] or signs[0] == "<" else "[",
                    ")" if names[-1] or signs[-1] == "<" else "]", low, high)
        unnamed = loose or len(sides) < len(names)      # "> 5"
        return interval if unnamed else (r"\in", sides[names.index(True)], interval)
    if len(sides) == 2 and sides[0][0] == sides[1][0] == "value":
        # An equation may be multiplied by a number; the ratio of what left minus right is at two
        # points does not change. (An inequality could turn around: it is compared as it is.)
        one, two = (a - b for a, b in zip(sides[0][1:], sides[1][1:]))
        if signs == ["="] and two % PRIME:
            return "=", one * pow(two, -1, PRIME) % PRIME
    return *signs, *sides


def unordered(items: list[tuple]) -> tuple:
    """Return items as a list or a union of intervals without order; one alone as it is."""
    flat = [one for item in items for one in (item[1:] if item[0] == "list" else [item])]
    return ("list", *sorted(flat, key=repr)) if len(flat) != 1 else flat[0]


def is_name(text: str) -> bool:
    r"""Tell whether `text` only names a quantity: x, f(x), x_1, (x, y), m\angle ABC."""
    text = re.sub(r"_\s*(?:\w|\{[^{}]*\})|\^\s*\{-1\}"
                  r"|(?<![A-Za-z\\])[A-Zf-h]\s*\([^()]*\)|(?<=[A-Za-z])\s*\(\d*\)", "", text)
    return not re.search(r"[-+*/^<>=\d]|\\(?:infty|frac|sqrt|pi)(?![a-zA-Z])", text)


def split_top(text: str, separator: str) -> list[str]:
    """Split at the separators outside of all brackets: [part, separator, part, ...]."""
    depth, start, parts = 0, 0, []
    for token in re.finditer(rf"[(\[{{]|[)\]}}]|\\begin|\\end|({separator})", text):
        if token[1] and depth == 0:
            parts += text[start:token.start()], token[1]
            start = token.end()
        elif not token[1]:
            depth += 1 if token[0] in ("(", "[", "{", r"\begin") else -1
    return [*parts, text[start:]]


def enclosed(text: str) -> str | None:
    r"""Return what stands inside if the first bracket of `text` closes at its end, else None."""
    ends = re.fullmatch(r"\\?\{(.*?)\\?\}|\\?[(\[](.*?)\\?[)\]]", text, re.S)
    depths = accumulate((c in "([{") - (c in ")]}") for c in text.lstrip("\\")[:-1])
    return ends[ends.lastindex] if ends and min(depths) > 0 else None


def squeeze(text: str) -> str:
    """Return text without spaces, braces and case, for what is no expression."""
    text = re.sub(r"[\s{}]", "", re.sub(r"\}\s*\{", ",", text))
    return text.lower() if len(text) > 1 else text


# ------------------------------------------------------------------ 5. statistics
# A row of predictions is one question with what the model made of it: {"question", "answer",
# ["level", "subject",] "text", "prediction", "correct", "tokens", "finished"}; with several
# completions the last five stand in each of a list "completions".

Z = 1.959964                # 95 % of a normal distribution lie within so many standard deviations


def completions_of(row: dict) -> list[dict]:
    """Return the completions of a row, be it one or several."""
    return row.get("completions") or [row]


def question_means(rows: list[dict]) -> np.ndarray:
    """Return the share of right completions of each question, (questions,) float."""
    return np.array([np.mean([c["correct"] for c in completions_of(row)]) for row in rows])


def summarize(rows: list[dict]) -> dict:
    """Return accuracy with its 95 % interval, and what explains it, of one set of predictions.

    n questions, `correct` right completions. The interval is Wilson's for one completion per
    question, else a bootstrap over questions, because completions of one question are not
    independent. mean_tokens per completion; cut_off and no_answer are shares. With k > 1
    completions also "mean@k", "maj@k" (majority vote) and the unbiased "pass@1", "pass@2",
    "pass@4", ... "pass@k".
    """
    completions = [completion for row in rows for completion in completions_of(row)]
    k, means = len(completions) // len(rows), question_means(rows)
    low, high = wilson(means.sum(), len(rows))
    if k > 1:
        low, high = bootstrap_or(low, high, means)
    summary = {
        "n": len(rows), "correct": sum(c["correct"] for c in completions),
        "accuracy": float(means.mean()), "low": low, "high": high,
        "mean_tokens": sum(c["tokens"] for c in completions) / len(completions),
        "cut_off": sum(not c["finished"] for c in completions) / len(completions),
        "no_answer": sum(c["prediction"] is None for c in completions) / len(completions)}
    if k > 1:
        votes = [majority_is_correct(completions_of(row)) for row in rows]
        summary |= {f"mean@{k}": summary["accuracy"], f"maj@{k}": sum(votes) / len(rows)}
        for tries in [2**i for i in range(10) if 2**i < k] + [k]:
            summary[f"pass@{tries}"] = float(np.mean(
                [pass_at(tries, k, round(mean * k)) for mean in means]))
    return summary


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval for a share (1927): sound for small n and near 0 and 1."""
    share, spread = correct / n, Z * Z / n
    half = Z * sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = ((share + spread / 2 + side) / (1 + spread) for side in (-half, half))
    return max(0.0, float(low)), min(1.0, float(high))


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of per-question values, resampled."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(2000)]
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def bootstrap_or(low: float, high: float, values: np.ndarray) -> tuple[float, float]:
    """Return bootstrap(values), but if all but a few values are alike no less than low .. high.

    Resampling says little of what is rare: where one of 30 questions is sometimes solved, its upper
    end lies far below that of wilson() where none ever is.
    """
    ends = bootstrap(values)
    few = len(values) - np.unique(values, return_counts=True)[1].max() < 10
    return (min(low, ends[0]), max(high, ends[1])) if few else ends


def pass_at(k: int, n: int, correct: int) -> float:
    """Return the chance that k of n completions hold a right one (Chen et al. 2021, eq. 1)."""
    return 1 - comb(n - correct, k) / comb(n, k)


def majority_is_correct(completions: list[dict]) -> bool:
    """Tell whether the most frequent answer is right. Of several, the one that came first wins.

    Answers that is_correct calls equal vote together; completions without an answer do not vote.
    """
    votes = []                              # for each completion the first that is equal to it
    for c in [c for c in completions if c["prediction"] is not None]:
        votes.append(next((v for v in votes if is_correct(c["prediction"], v["prediction"])), c))
    return bool(votes) and max(votes, key=lambda v: sum(v is w for w in votes))["correct"]


def compare(rows_a: list[dict], rows_b: list[dict]) -> dict:
    """Return what changed from a to b on the same questions: b's accuracy minus a's, paired.

    `won` and `lost` are the numbers (from 1) of the questions on which b is better or worse, p the
    exact two-sided sign test on their counts: for one completion per question, McNemar's. Then the
    95 % interval of the difference is Newcombe's, otherwise a bootstrap over questions.
    """
    if [(r["question"], r["answer"]) for r in rows_a] != [
            (r["question"], r["answer"]) for r in rows_b]:
        raise InputError("the two files do not hold the same questions in the same order")
    a, b = question_means(rows_a), question_means(rows_b)
    won, lost = ((np.flatnonzero(gain > 0) + 1).tolist() for gain in (b - a, a - b))
    low, high = newcombe(a, b)
    if "completions" in (rows_a[0] | rows_b[0]):
        low, high = bootstrap_or(low, high, b - a)
    discordant = len(won) + len(lost)
    tail = sum(comb(discordant, i) for i in range(min(len(won), len(lost)) + 1))
    return {"difference": float((b - a).mean()), "low": low, "high": high,
            "p": min(1.0, 2 * tail / 2**discordant), "won": won, "lost": lost}


def newcombe(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval for mean(b) - mean(a) of paired zeros and ones, (questions,) each.

    Newcombe 1998, method 10: the two Wilson intervals, combined with the correlation phi. It keeps
    a width when nothing differs, where the interval of a normal distribution would have none.
    """
    n, p, q = len(a), a.mean(), b.mean()
    product = (a * b).sum() * ((1 - a) * (1 - b)).sum() - (a > b).sum() * (a < b).sum()
    product = max(product - n / 2, 0) if product > 0 else product
    phi = product / (n * n * sqrt(p * q * (1 - p) * (1 - q))) if 0 < p < 1 and 0 < q < 1 else 0.0
    (low_a, high_a), (low_b, high_b) = wilson(a.sum(), n), wilson(b.sum(), n)
    down, up = (sqrt(max(0.0, x * x - 2 * phi * x * y + y * y)) for x, y in (
        (q - low_b, high_a - p), (high_b - q, p - low_a)))
    return float(q - p - down), float(q - p + up)


# ------------------------------------------------------------------ 6. asking a model


def evaluate(model, tokenizer, questions, *, out=None, max_new_tokens, n=1, temperature=0.0,
             top_p=1.0, seed=0, instruction="", token_budget=None, label="evaluate") -> list[dict]:
    """Ask each question n times; return one graded row per question, in order (see section 5).

    With `out`, completions are appended to out.part as they end, so that a run that was stopped
    goes on where it was, and the rows are in `out` at the end. InputError if out.part belongs to a
    different run, or if a prompt does not fit. `tokens` counts new tokens, the EOS included.
    """
    drawn, stops = sample.ask(
        out, model, tokenizer, questions, instruction, label, token_budget,
        max_new_tokens=max_new_tokens, n=n, temperature=temperature, top_p=top_p, seed=seed)
    rows = []
    for i, question in enumerate(questions):
        row = {k: question[k] for k in ("question", "answer", "level", "subject") if k in question}
        completions = [
            grade(tokenizer.decode(drawn[i, j], skip_special_tokens=True), row["answer"])
            | {"tokens": len(drawn[i, j]), "finished": drawn[i, j][-1] in stops}
            for j in range(n)]
        rows.append(row | (completions[0] if n == 1 else {"completions": completions}))
    if out:
        sample.write_jsonl(out, rows)
        Path(f"{out}.part").unlink()
    return rows


def grade(text: str, gold: str) -> dict:
    """Return a completion's text with the answer it gives, and whether that is right."""
    prediction = extract_answer(text)
    return {"text": text, "prediction": prediction, "correct": is_correct(prediction, gold)}


# ------------------------------------------------------------------ 7. printing, command line


def read_predictions(path) -> list[dict]:
    """Return the rows of a predictions file; InputError that names the row if one is no row."""
    types = dict(text=str, correct=bool, tokens=int, finished=bool)
    fits = lambda c: isinstance(c, dict) and all(isinstance(c.get(k), types[k]) for k in types)
    rows = sample.read_jsonl(path)
    for number, row in enumerate(rows, 1):
        several = row.get("completions", [row])
        if not (isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)
                and isinstance(several, list) and several and all(map(fits, several))):
            raise InputError(f"{path}, row {number}: not a row of predictions")
    if len({len(completions_of(row)) for row in rows}) != 1:
        raise InputError(f"{path} has no rows, or rows with different numbers of completions")
    return rows


def print_summary(rows: list[dict]) -> None:
    """Print accuracy and what explains it, over all questions and by level and subject."""
    groups = {"all": rows}
    for row in rows:
        for key in row.keys() & {"level", "subject"}:
            groups.setdefault(f"{key} {row[key]}", []).append(row)
    summaries = {name: summarize(group) for name, group in sorted(groups.items())}
    print_table(summaries)
    several = [f"{k} {100 * value:.1f} %" for k, value in summaries["all"].items() if "@" in k]
    print("  ".join(several + [f"one question = {100 / len(rows):.2g} points"]))


def print_table(summaries: dict) -> None:
    """Print accuracy and what explains it, a line for each of {name: summarize(rows)}."""
    print(f"{'':<32}{'n':>6}  accuracy   95 % interval  tokens  cut off  no answer")
    for name, s in summaries.items():
        s = s | {key: 100 * s[key] for key in ("accuracy", "low", "high", "cut_off", "no_answer")}
        print(f"{name:<32}{s['n']:>6}{s['accuracy']:>8.1f} %  {s['low']:5.1f} .. {s['high']:5.1f}"
              f"{s['mean_tokens']:>8.0f}{s['cut_off']:>7.1f} %{s['no_answer']:>9.1f} %")


def describe(paired: dict) -> str:
    """Return what compare() found in words, and whether it is beyond noise."""
    low, high = 100 * paired["low"], 100 * paired["high"]
    noise = "beyond noise" if low > 0 or high < 0 else "within noise"
    return (f"difference {100 * paired['difference']:+.1f} points, 95 % interval "
            f"[{low:+.1f}, {high:+.1f}], exact sign test p = {paired['p']:.2g}: {noise}")


def print_comparison(rows_a: list[dict], rows_b: list[dict]) -> None:
    """Print the paired difference from a to b, and which questions were won and lost."""
    c, n = compare(rows_a, rows_b), len(rows_a)
    before, after = (100 * question_means(rows).mean() for rows in (rows_a, rows_b))
    print(f"{n} questions, one question = {100 / n:.2g} points\n"
          f"accuracy {before:.1f} % -> {after:.1f} %: {describe(c)}")
    for name in ("won", "lost"):
        print(f"{name} {len(c[name])}: {' '.join(map(str, c[name]))}")


def regrade(path, out) -> list[dict]:
    """Grade the stored text of a predictions file again; write the rows to `out`, return them."""
    rows, changed = read_predictions(path), 0
    for row in rows:
        for completion in completions_of(row):
            before = completion["correct"]
            completion |= grade(completion["text"], row["answer"])
            changed += completion["correct"] != before
    sample.write_jsonl(out, rows)
    print(f"{changed} verdicts changed")
    return rows


def main(argv=None):
    """Parse the flags; compare two files, grade one again, or ask a model."""
    parser = model_parser(__doc__, split="test")
    parser.add_argument("--regrade", metavar="FILE", help="grade stored predictions again, without "
                        "a model; in place unless --out is given")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="what changed from A to B")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.data, args.regrade, args.compare))) != 1 or args.data and not args.out:
        raise InputError("give --data D --out FILE, or --regrade FILE, or --compare A B")
    sample.fill_defaults(args)
    if args.compare:
        return print_comparison(*map(read_predictions, args.compare))
    if args.out and args.out != args.regrade and Path(args.out).exists():
        raise InputError(f"{args.out} exists already: delete it or choose another --out")
    if args.regrade:
        return print_summary(regrade(args.regrade, args.out or args.regrade))
    questions = sample.load_questions(args.data, args.split, args.limit, need_answer=True)
    model, tokenizer = sample.load_model(args.model, args.device, args.dtype)
    names = "out max_new_tokens n temperature top_p seed instruction token_budget".split()
    print_summary(evaluate(model, tokenizer, questions, **{k: getattr(args, k) for k in names}))


if __name__ == "__main__":
    sample.run(main)
