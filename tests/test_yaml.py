"""YAML of recipes and studies: plain values as they were meant, and everything that could do harm refused by name."""

import itertools
import os

import pytest

from sasa._yaml import read_mapping

BOMB = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [*{name}, *{name}]\n" for name, after in itertools.pairwise("abcdefghi")
)


def test_plain_values(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("\ufeffrate: 1e-4\nother: [1.25e-3, 5, '5', 0x10, true, null]\nname: resnet14\nmore: {width: .5}\n")
    assert read_mapping(path) == {
        "rate": 1e-4,
        "other": [1.25e-3, 5, "5", 16, True, None],
        "name": "resnet14",
        "more": {"width": 0.5},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "line 2: expected values written out, got the alias [*]a"),
        ("a: &a\n  b: *a", "line 2: expected values written out, got the alias [*]a"),
        ("a: 1\n<<: {a: 2}", "line 2: expected text or a number, got the merge <<"),
        ("a: " + "[" * 5000, "line 1: expected at most 20 levels of nesting, got more"),
        ("a: " + "{b: " * 5000, "line 1: expected at most 20 levels of nesting, got more"),
        ("a: " + "- " * 5000, "line 1: "),
        ("a:\n" + "- " * 5000, "line 2: expected at most 20 levels of nesting, got more"),
        ("a: " + "9" * 5000, "line 1: expected a number of at most 64 characters, got 5000"),
        ("a: 0x" + "f" * 5000, "line 1: expected a number of at most 64 characters, got 5002"),
        ("a: 0b_", "expected YAML in UTF-8: invalid literal for int"),
        ("epochs: 1\nmodel: a\nepochs: 2", "line 3: epochs: expected each key once, got it twice"),
        ("a: {b: 1, b: 1}", "line 1: b: expected each key once, got it twice"),
        ("1: 2", "line 1: expected text as key, got 1"),
        ("? [a]\n: 2", "line 1: expected text as key, got a sequence"),
        ("a: 2024-13-45", "line 1: expected text or a number, got the timestamp 2024-13-45; put text in quotes"),
        ("a: !!python/object/apply:os.system [true]", "line 1: expected values without tags, got "),
        ("a: !!int b", "line 1: expected values without tags, got tag:yaml.org,2002:int"),
        ("a: [", "line 1: expected the node content"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("- 1", "expected keys with values, got a list"),
        ("", "expected keys with values, got nothing"),
        (b"a: \xff", "expected YAML in UTF-8: .* byte 0xff"),
        (b"a: \0", "expected YAML in UTF-8: unacceptable character"),
        ("a: " + "x" * 100_000, "expected at most 100,000 bytes of YAML, got more"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused(content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"bad[.]yaml: {message}"):
        read_mapping(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="expected a file of YAML"):
            read_mapping(path)
