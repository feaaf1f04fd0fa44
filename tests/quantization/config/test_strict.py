from typing import Annotated

import pytest
from pydantic import Field

from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import ConfigError


class Inner(Strict):
    size: int = 1


class Outer(Strict):
    positional = ("inner",)
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


def test_inner_faults_carry_the_whole_key_path():
    for build in (lambda data: Outer(**data), Outer.from_dict):
        with pytest.raises(ConfigError, match=r"^Outer\.many\[1\]\.size='x': "):
            build({"many": [{}, {"size": "x"}]})
        with pytest.raises(ConfigError, match=r"^Outer\.inner: unknown key 'sise' \(did you mean 'size'\?\)"):
            build({"inner": {"sise": 1}})


def test_the_source_comes_first():
    with pytest.raises(ConfigError, match=r"^a\.json: Outer\.inner\.size='x': "):
        Outer.from_dict({"inner": {"size": "x"}}, source="a.json")


def test_long_values_are_cut():
    with pytest.raises(ConfigError) as caught:
        Inner(size="x" * 1000)
    assert len(str(caught.value)) < 250


def test_words_without_those_of_pydantic():
    class Listed(Strict):
        names: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
        inner: Inner = Inner()

    for wrong, words in (
        ({"names": "x"}, r"names='x': a list is needed; put it into \[\.\.\.\]"),
        ({"names": []}, r"names=\[\]: the list is empty; name one or more"),
        ({"names": [""]}, r"names\[0\]='': the text is empty"),
        (
            {"names": ["x"], "inner": True},
            r"inner=True: a mapping of keys to values is needed \(in Python also Inner\(",
        ),
        ({"names": ["x"], "inner": None}, r"inner=None: the section is empty; give its keys, or leave it out"),
    ):
        with pytest.raises(ConfigError, match=rf"^Listed\.{words}"):
            Listed.from_dict(wrong)


def test_frozen():
    made = Inner(size=2)
    for change in (lambda: setattr(made, "size", 3), lambda: delattr(made, "size"), lambda: setattr(made, "other", 3)):
        with pytest.raises(
            ConfigError, match=r"^Inner\.(size|other): configurations are frozen; make a new one, Inner\("
        ):
            change()
    assert made.size == 2


def test_positions():
    assert Outer(Inner(size=2)) == Outer(inner=Inner(size=2))
    with pytest.raises(ConfigError, match="2 positional arguments, at most 1"):
        Outer(Inner(), ())
    with pytest.raises(ConfigError, match="inner given by position and by keyword"):
        Outer(Inner(), inner=Inner())


def test_a_misspelling_is_named_before_what_it_leaves_missing():
    class Needy(Strict):
        needed: int

    with pytest.raises(ConfigError, match=r"unknown key 'neded' .did you mean 'needed'"):
        Needy(neded=1)
