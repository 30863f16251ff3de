"""The key file: what it keeps of a key, what it refuses, and several writers at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.serving.keys import KeyFileError, KeyStore, NewKey, StoredKeyring


def new(**fields: Any) -> NewKey:
    given: Any = {"name": "team", **fields}
    return NewKey(**given)


def test_a_secret_is_shown_once_and_stored_nowhere(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "new" / "keys.db")
    stored, secret = store.create(NewKey("team", models=("a", "b-*"), requests_per_minute=3, expires_days=1))
    assert secret.startswith("ak-") and len(secret) == 46
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert not any(secret[3:].encode() in file.read_bytes() for file in store.path.parent.iterdir())
    (found,) = store.list()
    assert found == stored and found.key.models == ("a", "b-*") and found.key.requests_per_minute == 3
    assert found.expires is not None and round(found.expires - found.created) == 86400
    assert store.create(NewKey("other"))[1] != secret


def test_a_key_is_revoked_by_name_or_id_and_its_name_is_free_again(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    first, _ = store.create(NewKey("team"))
    with pytest.raises(UserError, match=r"there is a key team \(k-[0-9a-f]{10}, valid\); revoke it first"):
        store.create(NewKey("team"))
    assert store.revoke("team").revoked is None
    assert store.revoke("team").revoked is not None  # it says that it had ended
    second, _ = store.create(NewKey("team"))
    assert store.revoke("team").key.id == second.key.id
    assert store.revoke(first.key.id).revoked is not None
    with pytest.raises(UserError, match="no key 'tem'"):
        store.revoke("tem")
    assert [one.state() for one in store.list()] == ["revoked", "revoked"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": ""}, "expected 1 to 64"),
        ({"name": "a b"}, "expected 1 to 64"),
        ({"name": "k-0123456789"}, "not of the form of an id"),
        ({"name": "a\n"}, "expected 1 to 64"),
        ({"requests_per_minute": 0}, "requests per minute is 0, expected at least 1"),
        ({"token_budget": -5}, "tokens is -5"),
        ({"concurrency": 2**60}, "concurrency is"),
        ({"expires_days": 0}, "expires in 0 days"),
        ({"expires_days": float("nan")}, "expires in nan days"),
        ({"models": ("a", "")}, "models are 'a,'"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        new(**fields)


def test_what_is_no_key_file_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("remember the milk\n" * 100)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    newer = tmp_path / "newer.db"
    KeyStore(newer).create(NewKey("a"))
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    (tmp_path / "folder").mkdir()
    for name, error, said in (
        ("notes.txt", KeyFileError, "damaged"),
        ("other.db", UserError, "of another program"),
        ("newer.db", UserError, "version 99"),
        ("folder", KeyFileError, "cannot be opened"),
    ):
        before = (tmp_path / name).read_bytes() if name != "folder" else b""
        for use in (
            lambda path: KeyStore(path).create(NewKey("new")),
            lambda path: KeyStore(path).list(),
            StoredKeyring,
        ):
            with pytest.raises(error, match=said):
                use(tmp_path / name)
        assert name == "folder" or (tmp_path / name).read_bytes() == before
    with pytest.raises(UserError, match=r"no key file is there; `agentopt serve keys create NAME --keys"):
        StoredKeyring(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    code = (
        "import sys; from agentopt.serving.keys import KeyStore, NewKey\n"
        "for n in range(10): KeyStore(sys.argv[1]).create(NewKey(f'{sys.argv[2]}-{n}'))\n"
        "KeyStore(sys.argv[1]).revoke(f'{sys.argv[2]}-0')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b", "c")]
    assert [process.wait() for process in processes] == [0, 0, 0]
    keys = KeyStore(path).list()
    assert len({one.key.id for one in keys}) == 30
    assert sorted(one.key.name for one in keys if one.revoked) == ["a-0", "b-0", "c-0"]


def test_of_two_keys_of_one_name_made_at_once_there_is_one(tmp_path: Path) -> None:
    made: list[str] = []
    refused: list[str] = []

    def make() -> None:
        try:
            made.append(KeyStore(tmp_path / "keys.db").create(NewKey("same"))[1])
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 5)


def test_a_command_on_a_locked_file_says_so_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KeyStore(tmp_path / "keys.db")
    store.create(NewKey("team"))
    monkeypatch.setattr("agentopt.serving.keys._file.connect.__kwdefaults__", {"wait": 0.05})
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(KeyFileError, match="another process has locked the key file; nothing was changed"):
        store.revoke("team")
    other.close()
    assert store.list()[0].revoked is None
