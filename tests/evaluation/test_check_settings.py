"""What the settings of a check and of memory refuse, when they are made and not after the work."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from quarot_onnx import Check, Limits
from quarot_onnx.calibration.bos import Bos
from quarot_onnx.errors import ConfigError
from quarot_onnx.piecewise.memory import Memory

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(max_ppl_ratio=NAN), "^Limits.max_ppl_ratio=nan: .* finite number"),
        (lambda: Limits(max_kl=INF), "^Limits.max_kl=inf: .* finite number"),
        (lambda: Limits(max_kl=-0.1), "^Limits.max_kl=-0.1: .* greater than or equal to 0"),
        (lambda: Limits(max_ppl_ratio="a"), "^Limits.max_ppl_ratio='a': .* valid number"),
        (lambda: Limits(max_kl=True), "^Limits.max_kl=True: .* valid number"),
        (lambda: Limits(ppl_ratio=1.1), r"unknown key 'ppl_ratio' \(did you mean 'max_ppl_ratio'\?\)"),
        (lambda: Check(tokens=-5), "^Check.tokens=-5: .* greater than or equal to 1"),
        (lambda: Check(tokens=0), "^Check.tokens=0: .* greater than or equal to 1"),
        (lambda: Check(tokens=10**30), f"^Check.tokens={10**30}: .* less than"),
        (lambda: Check(tokens="many"), "^Check.tokens='many': .* valid integer"),
        (lambda: Check(text=5), "^Check.text=5: .* path"),
        (lambda: Check(text_key=5), "^Check.text_key=5: .* valid string"),
        (lambda: Check(bos=-1), "^Check.bos=-1: need a token id from 0 on, or a Bos"),
        (lambda: Check(bos="auto"), "^Check.bos='auto': need a token id"),
        (
            lambda: Check(limits=1.02),
            "^Check.limits=1.02: a mapping of keys to values is needed .in Python also Limits",
        ),
        (lambda: Memory(-1), "^Memory.limit=-1: .* greater than or equal to 1"),
        (lambda: Memory(0), "^Memory.limit=0: .* greater than or equal to 1"),
        (lambda: Memory(NAN), "^Memory.limit=nan: .* finite number"),
        (lambda: Memory("8GB"), "^Memory.limit='8GB': need a number of bytes, or None; Memory.of reads words"),
        (lambda: Memory(by_stages="no"), "^Memory.by_stages='no': .* valid boolean"),
    ],
)
def test_wrong_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_values_as_they_may_be_given() -> None:
    assert Limits(1, 2) == Limits(max_kl=1.0, max_ppl_ratio=2.0)
    assert Limits() != Limits(max_kl=0)
    assert Check(text="a.txt").text == Path("a.txt")
    kinds = (True, False, None, 1, Bos.AUTO)
    assert [Check(bos=bos).bos for bos in kinds] == [Bos.FORCED, Bos.NONE, Bos.NONE, 1, Bos.AUTO]
    assert [check.demanded for check in (Check(), Check(limits=Limits(0)), Check(text="a"))] == [False, True, True]
    assert Memory(8e9) == Memory(8 * 10**9)


def test_what_workers_are_sent() -> None:
    memory = Memory(300_000, by_stages=True)
    assert pickle.loads(pickle.dumps(memory)) == memory
