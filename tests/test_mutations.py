"""The bugs of the original in our code: guards fire, and the table is true."""

import pytest
from mutations import BUGS, FILE, Bug, examine, measure

from albor.artifacts import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured():
    return measure()


def test_our_own_code_sets_nothing_off():
    assert [name for name, fired in examine(Bug("", "", "")).items() if fired] == []


def test_every_bug_sets_off_its_guard(measured):
    for bug, found in zip(BUGS, measured["bugs"], strict=True):
        assert bug.guard in found["fired"], (bug.name, bug.what)


def test_the_usual_signs_are_silent_under_most(measured):
    usual = set(measured["checks"][-5:])
    silent = [bug for bug in measured["bugs"] if not usual & set(bug["fired"])]
    assert len(silent) > len(BUGS) / 2


def test_the_stored_table_is_what_a_fresh_run_finds(measured):
    stored = read_json(FILE)
    assert {key: stored[key] for key in measured} == measured
    assert all(name.startswith("ALB-") for name in stored["elsewhere"])
