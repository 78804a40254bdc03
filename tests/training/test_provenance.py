"""Differences of code and machine."""

from __future__ import annotations

from ppo_cli.training.provenance import what_differs

OLD, NEW = "a" * 40, "b" * 40


def test_only_what_both_know_is_compared() -> None:
    was = {
        "versions": {"torch": "2.9", "python": "3.11", "gone": "1"},
        "machine": {"threads": 2, "device": "cpu"},
        "git_commit": OLD,
    }
    now = {
        "versions": {"torch": "2.10", "python": "3.11", "new": "1"},
        "machine": {"threads": 4, "device": "cpu", "precision": "fp32"},
        "git_commit": None,
    }
    assert what_differs(was, now) == ["torch 2.9 (now 2.10)", "threads 2 (now 4)"]
    assert what_differs(was, {**was, "git_commit": NEW}) == [
        f"git commit {OLD[:12]} (now {NEW[:12]})"
    ]
    assert what_differs({}, now) == what_differs({"versions": 3}, now) == []
