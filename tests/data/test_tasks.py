"""Generated tasks: right answers, wrong answers, splits, determinism."""

from __future__ import annotations

import random
import re

import pytest

from fastllm.data.records import preference_records, prompt_records, sft_records
from fastllm.data.tasks import (
    KINDS,
    Task,
    careless_answer,
    check,
    create_dummy_preference_data,
    demonstrations,
    exact_match,
    generate_tasks,
    grpo_prompts,
    preference_pairs,
    wrong_answer,
)


def solved(prompt: str) -> str:
    """The right answer, found in another way than the generator's."""
    if sum_ := re.fullmatch(r"(\d+)([+-])(\d+)(?:-(\d+))?=", prompt):
        a, sign, b, c = sum_.groups()
        return str(int(a) + (int(b) if sign == "+" else -int(b)) - int(c or 0))
    if count := re.fullmatch(r"count (\w) in (\w+)>", prompt):
        letter, word = count.groups()
        return str(len(word) - len(word.replace(letter, "")))
    if larger := re.fullmatch(r"max (\d+) (\d+)>", prompt):
        return max(larger.groups(), key=lambda digits: (len(digits), digits))
    verb, word = re.fullmatch(r"(\w+) (\w+)>", prompt).groups()
    letters = list(word)
    if verb == "rev":
        letters.reverse()
    elif verb == "sort":
        letters.sort()
    else:
        assert verb == "copy"
    return "".join(letters)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right(split):
    for task in generate_tasks(3000, seed=1, split=split):
        assert task.answer == solved(task.prompt), task
        assert check(task, task.answer)
        assert not task.answer.startswith("-")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_level_it_has(kind):
    for level in KINDS[kind][1]:
        tasks = generate_tasks(50, seed=0, levels=[level], kinds=[kind])
        assert {(task.kind, task.level) for task in tasks} == {(kind, level)}


def test_levels_grow_in_difficulty():
    for kind in ("add", "rev"):
        lengths = [
            sum(len(t.prompt) for t in generate_tasks(200, 0, levels=[level], kinds=[kind]))
            for level in (1, 2, 3)
        ]
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[2]


def test_all_kinds_come_evenly():
    tasks = generate_tasks(4000, seed=0)
    counts = {kind: sum(task.kind == kind for task in tasks) for kind in KINDS}
    assert all(counts.values())
    assert counts["count"] == pytest.approx(4000 / 20, rel=0.25)


def test_deterministic_and_a_prefix_of_more():
    assert generate_tasks(100, seed=3) == generate_tasks(200, seed=3)[:100]
    assert generate_tasks(100, seed=3) != generate_tasks(100, seed=4)
    pairs = preference_pairs(generate_tasks(50, 0), seed=5)
    assert pairs == preference_pairs(generate_tasks(50, 0), seed=5)
    assert pairs != preference_pairs(generate_tasks(50, 0), seed=6)


def test_these_very_tasks():
    """Results are compared between versions, so the tasks must not change unnoticed."""
    assert [task.prompt + task.answer for task in generate_tasks(4, seed=0)] == [
        "sort iaic>acii",
        "66-44=22",
        "max 635 202>635",
        "sort jjfjc>cfjjj",
    ]


def test_splits_are_disjoint_whatever_the_seed():
    train = {task.prompt for seed in range(3) for task in generate_tasks(3000, seed)}
    heldout = {task.prompt for task in generate_tasks(2000, 7, split="heldout")}
    assert not train & heldout


def test_prompts_repeat_only_when_there_are_no_more():
    tasks = generate_tasks(1000, seed=0, levels=[2])
    assert len({task.prompt for task in tasks}) == 1000
    small = generate_tasks(500, seed=0, levels=[1], kinds=["add"])
    assert 70 <= len({task.prompt for task in small}) <= 90  # four fifths of 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ["mul"]}, "kinds must be among add, .*, found 'mul'"),
        ({"levels": [4]}, "levels must be among 1, 2 and 3, found 4"),
        ({"levels": [1], "kinds": ["count"]}, "no tasks of the kinds .* at the levels"),
        ({"split": "test"}, "split must be 'train' or 'heldout', found 'test'"),
    ],
)
def test_faults(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_tasks(1, seed=0, **arguments)


def test_wrong_answers_are_wrong_but_near():
    rng = random.Random(0)
    for task in generate_tasks(3000, seed=2):
        wrong = wrong_answer(task, rng)
        assert wrong != task.answer
        assert wrong
        assert not check(task, wrong)
        assert wrong.isdigit() == task.answer.isdigit()
        assert abs(len(wrong) - len(task.answer)) <= 1 or wrong == careless_answer(task)
        assert wrong == "0" or not wrong.startswith("0")


def test_even_the_smallest_answers_have_wrong_ones():
    rng = random.Random(0)
    for task in (Task("0+0=", "0", "add", 1), Task("copy aaa>", "aaa", "copy", 1)):
        assert len({wrong_answer(task, rng) for _ in range(100)}) > 2


@pytest.mark.parametrize(
    ("prompt", "kind", "answer"),
    [
        ("58+67=", "add", "115"),
        ("12+35=", "add", "47"),
        ("52-17=", "sub", "45"),
        ("110-20=", "sub", "110"),
        ("12+30-7=", "chain", "42"),
        ("max 12 35>", "max", "12"),
        ("copy abc>", "copy", "ab"),
        ("rev abcd>", "rev", "adcb"),
        ("sort dbca>", "sort", "adbc"),
        ("count a in abca>", "count", "1"),
    ],
)
def test_careless_answers(prompt, kind, answer):
    assert careless_answer(Task(prompt, "?", kind, 2)) == answer


def test_careless_demonstrations():
    tasks = generate_tasks(2000, seed=0, levels=[2], kinds=["rev"])
    records = demonstrations(tasks, careless=0.6, seed=1)
    careless = [r["completion"] == careless_answer(t) for r, t in zip(records, tasks, strict=True)]
    right = [r["completion"] == t.answer for r, t in zip(records, tasks, strict=True)]
    assert all(a or b for a, b in zip(careless, right, strict=True))
    assert sum(careless) / 2000 == pytest.approx(0.6, abs=0.05)
    assert records == demonstrations(tasks, careless=0.6, seed=1)
    assert records != demonstrations(tasks, careless=0.6, seed=2)


def test_records():
    tasks = generate_tasks(20, seed=0)
    (first, *_) = tasks
    assert demonstrations(tasks)[0] == {"prompt": first.prompt, "completion": first.answer}
    assert grpo_prompts(tasks)[0] == {"prompt": first.prompt, "answer": first.answer}
    assert preference_pairs(tasks, 0)[0].keys() == {"prompt", "chosen", "rejected"}
    assert len(sft_records(demonstrations(tasks))) == 20
    assert len(prompt_records(grpo_prompts(tasks))) == 20
    assert len(preference_records(create_dummy_preference_data(n_pairs=20))) == 20


def test_exact_match():
    rewards = exact_match(
        prompts=["1+1="] * 6,
        completions=[
            "2",
            " 2\n",
            "2<eos>junk",
            "22",
            "",
            [{"role": "assistant", "content": "2"}],
        ],
        answer=["2"] * 6,
        completion_ids=None,
        trainer_state=None,
    )
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def test_check():
    task = Task("1+1=", "2", "add", 1)
    assert check(task, "2 ")
    assert not check(task, "3")
