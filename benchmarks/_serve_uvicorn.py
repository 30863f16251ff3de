"""The gateway of `serve_load.py` inside uvicorn instead of our own server: the same application, the same observers.

python _serve_uvicorn.py PORT ENGINE_PORT FOLDER      serves until SIGTERM; writes a key to FOLDER/secret
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


async def run(port: int, engine_port: int, folder: Path) -> None:
    """Assemble, serve, close."""
    import uvicorn

    from agentopt.serving._catalog import ServedCatalog
    from agentopt.serving._types import Abilities, Address
    from agentopt.serving.fake_engine import Ready
    from agentopt.serving.gateway import AccessLog, Gateway
    from agentopt.serving.keys import KeyStore, NewKey, StoredKeyring
    from agentopt.serving.metrics import Meter

    keys = folder / "keys.db"
    _, secret = KeyStore(keys).create(NewKey("load"))
    (folder / "secret").write_text(secret, encoding="utf-8")
    engine = Ready(Address(port=engine_port), Abilities(model="fake"))
    catalog = ServedCatalog(["fake"], engine)
    log = AccessLog(folder / "gateway.log")
    async with StoredKeyring(keys) as keyring:
        gateway = Gateway(engine, catalog, keyring=keyring, observers=[log, Meter(catalog)])
        config = uvicorn.Config(
            gateway, port=port, http="httptools", access_log=False, log_level="error", lifespan="off"
        )
        await uvicorn.Server(config).serve()
        gateway.close()
    log.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
