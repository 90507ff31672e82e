"""What a party may use: rates, budgets, hours, bytes; refused in a way that tells whether waiting helps."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from model_owner.observer import PassingAccount
from model_owner.quotas import BURST_S, Quota, Quotas
from model_owner.refusals import Refusal
from splitfl.errors import UsageError


def at(clock):
    """Unix time of today at this hour, in UTC."""
    hours, minutes = map(int, clock.split(":"))
    return datetime(2026, 5, 4, hours, minutes, tzinfo=UTC).timestamp()


def quotas(tmp_path, text, **options):
    path = tmp_path / "parties.toml"
    path.write_text(text, encoding="utf-8")
    return Quotas(path, **options)


def refused(ask, *arguments):
    with pytest.raises(Refusal) as found:
        ask(*arguments)
    return found.value


def test_a_party_that_is_not_named_has_the_default(tmp_path):
    made = quotas(tmp_path, "[default]\nweight = 0.5\n[parties.clinic]\nweight = 2\n")
    assert (made.of("clinic").weight, made.of("other").weight) == (2.0, 0.5)
    assert Quotas().of("anybody") == Quota()


@pytest.mark.parametrize(
    "text",
    ["[parties.a]\nwight = 1", "[parties.a]\nweight = 0", "[default]\nhours = ['25:00-26:00']", "[default", "x = 1",
     "[default]\ntotal_tokens = -1", "[default]\ntokens_per_second = 0", "[default]\nweight = nan"],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="quotas"):
        quotas(tmp_path, text)


def test_where_the_new_file_cannot_be_used_the_old_values_stay(tmp_path, caplog):
    made = quotas(tmp_path, "[default]\nweight = 3")
    made.path.write_text("[default]\nweight = 'much'", encoding="utf-8")
    made.reload()
    assert made.of("a").weight == 3
    assert "old values stay" in caplog.text
    made.path.write_text("[default]\nweight = 4", encoding="utf-8")
    made.reload()
    assert made.of("a").weight == 4


def test_a_bucket_goes_into_debt_once_and_says_how_long_to_wait(tmp_path):
    """Any size is admitted while something is left, so no batch is too large for its rate; the average holds."""
    made = quotas(tmp_path, "[parties.a]\ntokens_per_second = 100")
    made.admit("a", 1000, 0)
    no = refused(made.admit, "a", 1, 0)
    assert no.code == "busy"
    debt = 1000 - 100 * BURST_S
    assert debt / 100 - 1 < no.retry_after_s <= debt / 100
    made.admit("b", 1_000_000, 0)
    made.admit("a", 0, 0)  # a backward was paid for by its forward


def test_the_rate_is_kept_on_average(tmp_path):
    made = quotas(tmp_path, "[parties.a]\ntokens_per_second = 4000")
    begun, served, pauses = time.monotonic(), 0, []
    while time.monotonic() - begun < 0.5:
        try:
            made.admit("a", 500, 0)
            served += 500
        except Refusal as no:
            pauses.append(no.retry_after_s)
            time.sleep(no.retry_after_s)
    spent = time.monotonic() - begun
    assert all(0 < pause <= 500 / 4000 for pause in pauses)
    assert 4000 * (BURST_S + spent) - 1000 <= served <= 4000 * (BURST_S + spent) + 500


async def test_what_failed_is_given_back(tmp_path):
    made = quotas(tmp_path, "[parties.a]\ntokens_per_second = 100\ntotal_tokens = 2000\nmax_bytes_in_flight = 10")
    charge = made.admit("a", 2000, 10)
    assert refused(made.admit, "a", 1, 0).code == "busy"
    made.cancel(charge)
    charge = made.admit("a", 2000, 10)
    await made.settle(charge)
    made.cancel(charge)  # too late: its answer has left
    assert made.account.spent_tokens("a") == 2000
    assert made.bytes_in_flight("a") == 0


async def test_a_budget_is_never_exceeded_and_ends_with_quota(tmp_path):
    account = PassingAccount()
    made = quotas(tmp_path, "[parties.a]\ntotal_tokens = 100", account=account)
    first = made.admit("a", 60, 0)
    waits = refused(made.admit, "a", 60, 0)  # the first may still fail
    assert waits.code == "quota" or waits.retry_after_s > 0
    assert refused(made.admit, "a", 41, 0).code == "busy"
    assert refused(made.admit, "a", 101, 0).code == "quota"
    await made.settle(first)
    assert refused(made.admit, "a", 41, 0).code == "quota"
    made.check_session("a")
    await made.settle(made.admit("a", 40, 0))
    assert account.spent_tokens("a") == 100
    assert refused(made.admit, "a", 1, 0).code == "quota"
    assert refused(made.check_session, "a").code == "quota"
    made.admit("a", 0, 0)


def test_a_budget_of_nothing_serves_nothing(tmp_path):
    made = quotas(tmp_path, "[parties.a]\ntotal_tokens = 0")
    assert refused(made.check_session, "a").code == "quota"
    assert refused(made.admit, "a", 1, 0).code == "quota"


def test_bytes_under_way_are_bounded(tmp_path):
    made = quotas(tmp_path, "[parties.a]\nmax_bytes_in_flight = 100")
    first = made.admit("a", 1, 60)
    assert refused(made.admit, "a", 1, 41).code == "busy"
    made.admit("a", 1, 40)
    made.cancel(first)
    made.admit("a", 1, 60)
    assert refused(made.admit, "a", 1, 101).code == "quota"  # never possible


@pytest.mark.parametrize(
    ("clock", "wait_h"),
    [
        ("21:59", 1 / 60),
        ("22:00", 0),
        ("23:59", 0),
        ("00:00", 0),
        ("05:59", 0),
        ("06:00", 6),
        ("12:00", 0),
        ("13:00", 9),
    ],
)
def test_hours_are_utc_and_go_over_midnight(tmp_path, clock, wait_h):
    made = quotas(tmp_path, '[default]\nhours = ["22:00-06:00", "12:00-13:00"]', clock=lambda: at(clock))
    if not wait_h:
        made.check_session("a")
        made.admit("a", 1, 1)
        return
    for no in (refused(made.check_session, "a"), refused(made.admit, "a", 1, 1)):
        assert (no.code, no.retry_after_s) == ("busy", pytest.approx(wait_h * 3600))
    made.admit("a", 0, 1)
