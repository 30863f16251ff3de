"""The gateway of `serve_load.py` in a process of its own: as `agentopt serve` runs it, before an engine that is there.

    python _serve_gateway.py PORT ENGINE_PORT FOLDER [--capture]      serves until SIGTERM

Keys, the access log, the meter and, where asked for, capture are those of the command; only the supervisor is left out.
It makes a key of its own and writes the secret to FOLDER/secret.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


async def run(port: int, engine_port: int, folder: Path, capture: bool) -> None:
    """Assemble, serve, close."""
    from agentopt.serving._catalog import ServedCatalog
    from agentopt.serving._types import Abilities, Address
    from agentopt.serving.fake_engine import Ready
    from agentopt.serving.gateway import AccessLog, Gateway, Limits, serve_app
    from agentopt.serving.keys import KeyStore, NewKey, StoredKeyring
    from agentopt.serving.metrics import Meter

    keys = folder / "keys.db"
    _, secret = KeyStore(keys).create(NewKey("load"))
    (folder / "secret").write_text(secret, encoding="utf-8")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engine = Ready(Address(port=engine_port, token="inside"), Abilities(model="fake"))
    catalog = ServedCatalog(["fake"], engine)
    observers: list[Any] = [AccessLog(folder / "gateway.log"), Meter(catalog)]
    if capture:
        from agentopt.serving.capture import Recorder

        recorder = Recorder(folder / "store.db")
        recorder.start()
        observers.append(recorder)
    async with StoredKeyring(keys) as keyring:
        gateway = Gateway(engine, catalog, keyring=keyring, observers=observers)
        await serve_app(gateway, "127.0.0.1", port, ready=None, stop=stop, limits=Limits())
        gateway.close()
    for observer in observers:
        if hasattr(observer, "close"):
            observer.close()


if __name__ == "__main__":
    arguments = [one for one in sys.argv[1:] if not one.startswith("--")]
    import uvloop

    uvloop.run(run(int(arguments[0]), int(arguments[1]), Path(arguments[2]), "--capture" in sys.argv))
