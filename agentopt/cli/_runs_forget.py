"""`agentopt runs forget`: captured exchanges are deleted from the store, by age, session, key, request or run."""

from __future__ import annotations

import json
import re
import time

from agentopt.cli._console import out
from agentopt.cli._runs import find_run, open_store
from agentopt.errors import UserError
from agentopt.store import Forgotten, Store

_AGE = re.compile(r"(\d+(?:\.\d+)?) ?([hdw])")
_SECONDS = {"h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}


def forget_runs(
    store_path: str | None,
    *,
    older_than: str | None,
    session: str | None,
    key: str | None,
    requests: tuple[str, ...],
    run: str | None,
    vacuum: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete what is chosen and print how much that was.

    Raises:
        UserError: nothing is chosen, an age cannot be read, or there is no store.
    """
    from agentopt.serving.capture import Chosen, forget, forget_old

    if older_than is None and session is None and key is None and run is None and not requests:
        raise UserError("which exchanges? give --older-than AGE, --session NAME, --key ID, --request ID or --run RUN.")
    if dry_run and vacuum:
        raise UserError("--vacuum does nothing with --dry-run; leave one of them out.")
    before = None if older_than is None else time.time() - age_seconds(older_than)
    with open_store(store_path) as store:
        chosen = Chosen(before, session, key, requests, None if run is None else find_run(store, run).id)
        if dry_run:
            _print(_would(store, chosen.find(store)), as_json, done=False)
            return
        only_age = before is not None and chosen == Chosen(before)
        found = Forgotten()
        for part in forget_old(store, before) if only_age and before is not None else forget(store, chosen):
            found += part
        if not only_age:
            while store.release():
                pass
        if vacuum:
            store.compact()
    _print(found, as_json, done=True)


def age_seconds(text: str) -> float:
    """`30d`, `12h`, `4w` in seconds.

    Raises:
        UserError: it is none of these.
    """
    match = _AGE.fullmatch(text.strip().lower())
    if match is None:
        raise UserError(f"--older-than {text!r}: expected a number and h, d or w (hours, days, weeks), such as 30d.")
    return float(match[1]) * _SECONDS[match[2]]


def _would(store: Store, found: list[tuple[str, str, int]]) -> Forgotten:
    chosen = {exchange for exchange, _, _ in found}
    feedback = sum(row["exchange_id"] in chosen for row in store.feedback()) if chosen else 0
    return Forgotten(len(chosen), len({trace for _, trace, _ in found}), feedback)


def _print(found: Forgotten, as_json: bool, *, done: bool) -> None:
    if as_json:
        numbers = {"exchanges": found.exchanges, "traces": found.traces, "feedback": found.feedback, "runs": found.runs}
        print(json.dumps({"deleted": done, **numbers}))
        return
    words = f"exchanges: {found.exchanges:,}, traces: {found.traces:,}, pieces of feedback: {found.feedback:,}"
    out().print(f"deleted {words}, empty runs: {found.runs:,}" if done else f"would delete {words}")
