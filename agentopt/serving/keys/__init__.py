"""API keys of the endpoint: a file of them, the commands that change it, and the keyring of a running server."""

from agentopt.serving.keys._file import KeyFileError, StoredKey
from agentopt.serving.keys._ring import Clock, StoredKeyring, may_ask
from agentopt.serving.keys._store import KeyStore, NewKey

__all__ = ["Clock", "KeyFileError", "KeyStore", "NewKey", "StoredKey", "StoredKeyring", "may_ask"]
