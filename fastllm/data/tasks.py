"""Generated tasks with exact answers: the embedded default data, and a verifier for GRPO.

Every task is one short line with one right answer, at three levels of difficulty:

    kind    level 1      level 2         level 3
    add     "3+5=" 8     "12+35=" 47     "123+456=" 579
    sub     "8-3=" 5     "47-12=" 35     "579-456=" 123
    chain                                "12+30-7=" 35
    max     "max 12 35>" 35  3 digits     4 digits
    copy    "copy abc>"  4 or 5 letters  6 to 8 letters
    rev     "rev abc>"   4 or 5 letters  6 to 8 letters
    sort    "sort cab>"  4 or 5 letters  6 to 8 letters
    count                                "count a in abca>" 2

Tasks depend on the seed alone. A prompt belongs to the split "train" or "heldout" by its hash
(about one in five is held out), so no held-out prompt is ever trained on, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "heldout"]

LEVELS = (1, 2, 3)
LETTERS = "abcdefghij"
WORD_LENGTHS = {1: (3, 3), 2: (4, 5), 3: (6, 8)}
HELDOUT_SHARE = 0.2
# Small levels run out of prompts; after so many tries a prompt may come twice.
TRIES_FOR_A_NEW_PROMPT = 20


@dataclass(frozen=True, slots=True)
class Task:
    """One question with its one right answer."""

    prompt: str
    answer: str
    kind: str
    level: int


def generate_tasks(
    n: int,
    seed: int,
    levels: Sequence[int] = LEVELS,
    kinds: Sequence[str] | None = None,
    split: Split = "train",
) -> list[Task]:
    """Return `n` tasks drawn evenly from the given kinds (None: all) at the given levels.

    The same arguments always give the same tasks, and a smaller `n` gives their beginning.
    Prompts are not repeated while there are new ones to be found.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', found {split!r}")
    choices = _choices(levels, kinds)
    rng = random.Random(f"tasks {split} {seed}")
    tasks: list[Task] = []
    seen: set[str] = set()
    while len(tasks) < n:
        kind, level = rng.choice(choices)
        task = _draw(kind, level, split, rng)
        for _ in range(TRIES_FOR_A_NEW_PROMPT):
            if task.prompt not in seen:
                break
            task = _draw(kind, level, split, rng)
        seen.add(task.prompt)
        tasks.append(task)
    return tasks


def demonstrations(
    tasks: Iterable[Task], careless: float = 0.0, seed: int = 0
) -> list[dict[str, str]]:
    """Return SFT records: the task and its answer.

    A share of `careless` of them, drawn at random, has the careless answer instead of the right
    one, as demonstrations that people write do.
    """
    rng = random.Random(f"demonstrations {seed}")
    return [
        {
            "prompt": task.prompt,
            "completion": careless_answer(task) if rng.random() < careless else task.answer,
        }
        for task in tasks
    ]


def preference_pairs(
    tasks: Iterable[Task], seed: int, careless: float = 0.0
) -> list[dict[str, str]]:
    """Return preference records: the right answer against a subtly wrong one.

    A share of `careless` of the wrong answers are the careless ones, where those are wrong.
    """
    rng = random.Random(f"pairs {seed}")
    return [
        {"prompt": task.prompt, "chosen": task.answer, "rejected": _rejected(task, rng, careless)}
        for task in tasks
    ]


def _rejected(task: Task, rng: random.Random, careless: float) -> str:
    short_cut = careless_answer(task) if rng.random() < careless else task.answer
    return wrong_answer(task, rng) if short_cut == task.answer else short_cut


def grpo_prompts(tasks: Iterable[Task]) -> list[dict[str, str]]:
    """Return prompt records with the answer as the column that `exact_match` checks."""
    return [{"prompt": task.prompt, "answer": task.answer} for task in tasks]


def create_dummy_preference_data(n_pairs: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `n_pairs` generated preference records of all kinds and levels."""
    return preference_pairs(generate_tasks(n_pairs, seed), seed)


def check(task: Task, completion: str) -> bool:
    """Tell whether the completion is the right answer."""
    return _final_text(completion) == task.answer


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any
) -> list[float]:
    """Reward 1.0 for the right answer, else 0.0 (TRL's signature of a reward function)."""
    return [
        float(_final_text(completion) == right.strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def _final_text(completion: Any) -> str:
    if not isinstance(completion, str):  # conversational: one message, or a list of them
        completion = completion[-1]["content"]
    text: str = completion.split("<eos>")[0]
    return text.strip()


# --- drawing tasks -------------------------------------------------------------------------


def _add(level: int, rng: random.Random) -> tuple[str, str]:
    a, b = _number(level, rng), _number(level, rng)
    return f"{a}+{b}=", str(a + b)


def _sub(level: int, rng: random.Random) -> tuple[str, str]:
    a, b = sorted((_number(level, rng), _number(level, rng)), reverse=True)
    return f"{a}-{b}=", str(a - b)


def _chain(level: int, rng: random.Random) -> tuple[str, str]:
    a, b = _number(2, rng), _number(2, rng)
    c = rng.randint(1, min(99, a + b))
    return f"{a}+{b}-{c}=", str(a + b - c)


def _max(level: int, rng: random.Random) -> tuple[str, str]:
    a, b = _number(level + 1, rng), _number(level + 1, rng)
    return f"max {a} {b}>", str(max(a, b))


def _copy(level: int, rng: random.Random) -> tuple[str, str]:
    word = _word(level, rng)
    return f"copy {word}>", word


def _rev(level: int, rng: random.Random) -> tuple[str, str]:
    word = _word(level, rng)
    return f"rev {word}>", word[::-1]


def _sort(level: int, rng: random.Random) -> tuple[str, str]:
    word = _word(level, rng)
    return f"sort {word}>", "".join(sorted(word))


def _count(level: int, rng: random.Random) -> tuple[str, str]:
    letter = rng.choice(LETTERS)
    others = rng.choices(LETTERS, k=rng.randint(2, 4))
    word = others + [letter] * rng.randint(1, 4)
    rng.shuffle(word)
    return f"count {letter} in {''.join(word)}>", str(word.count(letter))


def _number(level: int, rng: random.Random) -> int:
    return rng.randint(0 if level == 1 else 10 ** (level - 1), 10**level - 1)


def _word(level: int, rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(*WORD_LENGTHS[level])))


_Draw = Callable[[int, random.Random], tuple[str, str]]

KINDS: dict[str, tuple[_Draw, tuple[int, ...]]] = {
    "add": (_add, (1, 2, 3)),
    "sub": (_sub, (1, 2, 3)),
    "chain": (_chain, (3,)),
    "max": (_max, (1, 2, 3)),
    "copy": (_copy, (1, 2, 3)),
    "rev": (_rev, (1, 2, 3)),
    "sort": (_sort, (1, 2, 3)),
    "count": (_count, (3,)),
}
"""How a task of each kind is drawn, and the levels at which the kind exists."""


def _choices(levels: Sequence[int], kinds: Sequence[str] | None) -> list[tuple[str, int]]:
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, found {kind!r}")
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"levels must be among 1, 2 and 3, found {level!r}")
    choices = [
        (kind, level)
        for kind in (KINDS if kinds is None else kinds)
        for level in levels
        if level in KINDS[kind][1]
    ]
    if not choices:
        raise ValueError(f"there are no tasks of the kinds {kinds} at the levels {levels}")
    return choices


def _draw(kind: str, level: int, split: Split, rng: random.Random) -> Task:
    while True:
        prompt, answer = KINDS[kind][0](level, rng)
        if _is_heldout(prompt) == (split == "heldout"):
            return Task(prompt, answer, kind, level)


def _is_heldout(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * HELDOUT_SHARE


# --- wrong answers -------------------------------------------------------------------------


def careless_answer(task: Task) -> str:
    """Return what somebody answers who always takes the same short cut.

    Columns are added without carrying and subtracted the smaller from the larger; the last step
    of a chain is left out; the first number counts as the larger one. A word keeps its first
    letter when reversed, only gets its smallest letter to the front when sorted, and loses its
    last letter when copied; when letters are counted, the last one is not looked at. Often that
    is wrong, sometimes it is right.
    """
    return _SHORT_CUTS[task.kind](task.prompt)


def _without_carrying(prompt: str) -> str:
    a, b = prompt.rstrip("=").split("+")
    width = max(len(a), len(b))
    columns = [int(x) + int(y) for x, y in zip(a.zfill(width), b.zfill(width), strict=True)]
    return str(columns[0]) + "".join(str(c % 10) for c in columns[1:])


def _smaller_from_larger(prompt: str) -> str:
    a, b = prompt.rstrip("=").split("-")
    digits = [abs(int(x) - int(y)) for x, y in zip(a, b.zfill(len(a)), strict=True)]
    return str(int("".join(map(str, digits))))


def _without_last_step(prompt: str) -> str:
    a, b = prompt.split("-")[0].split("+")
    return str(int(a) + int(b))


def _word_of(prompt: str) -> str:
    return prompt.split()[-1].rstrip(">")


def _smallest_first(prompt: str) -> str:
    word = _word_of(prompt)
    place = word.index(min(word))
    return word[place] + word[:place] + word[place + 1 :]


def _count_short(prompt: str) -> str:
    return str(_word_of(prompt)[:-1].count(prompt.split()[1]))


_SHORT_CUTS: dict[str, Callable[[str], str]] = {
    "add": _without_carrying,
    "sub": _smaller_from_larger,
    "chain": _without_last_step,
    "max": lambda prompt: prompt.split()[1],
    "copy": lambda prompt: _word_of(prompt)[:-1],
    "rev": lambda prompt: _word_of(prompt)[0] + _word_of(prompt)[:0:-1],
    "sort": _smallest_first,
    "count": _count_short,
}


def wrong_answer(task: Task, rng: random.Random) -> str:
    """Return a wrong answer of the kind that a model in training gives: nearly right."""
    slips = _NUMBER_SLIPS if task.answer.isdigit() else _WORD_SLIPS
    while True:
        wrong = rng.choice(slips)(task, rng)
        leading_zero = wrong.startswith("0") and len(wrong) > 1
        if wrong and wrong != task.answer and not leading_zero:
            return wrong


def _near(task: Task, rng: random.Random) -> str:
    return str(abs(int(task.answer) + rng.choice((-2, -1, 1, 2))))


def _one_digit_off(task: Task, rng: random.Random) -> str:
    place = 10 ** rng.randrange(len(task.answer))
    wrong = str(abs(int(task.answer) + rng.choice((-place, place))))
    return wrong if len(wrong) >= len(task.answer) else ""


def _another_digit(task: Task, rng: random.Random) -> str:
    return _replaced(task.answer, rng, "0123456789")


def _another_letter(task: Task, rng: random.Random) -> str:
    return _replaced(task.answer, rng, LETTERS)


def _replaced(text: str, rng: random.Random, alphabet: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + rng.choice(alphabet) + text[place + 1 :]


def _swapped(task: Task, rng: random.Random) -> str:
    if len(task.answer) < 2:
        return ""
    place = rng.randrange(len(task.answer) - 1)
    swapped = task.answer[place : place + 2][::-1]
    return task.answer[:place] + swapped + task.answer[place + 2 :]


def _dropped(task: Task, rng: random.Random) -> str:
    place = rng.randrange(len(task.answer))
    return task.answer[:place] + task.answer[place + 1 :]


def _doubled(task: Task, rng: random.Random) -> str:
    place = rng.randrange(len(task.answer))
    return task.answer[: place + 1] + task.answer[place:]


def _unchanged(task: Task, rng: random.Random) -> str:
    """The word itself, as if nothing had been asked of it."""
    return _word_of(task.prompt)


def _careless(task: Task, rng: random.Random) -> str:
    return careless_answer(task)


_NUMBER_SLIPS = (_near, _one_digit_off, _another_digit, _swapped, _dropped, _doubled, _careless)
_WORD_SLIPS = (_another_letter, _swapped, _dropped, _doubled, _unchanged, _careless)
