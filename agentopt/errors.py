"""The errors a person meets, and the exit code each one carries.

A `UserError` is a mistake in what was given (file, option, parameter): one sentence that names what was found, what was
expected and what to do. A `RunError` is a run that could not finish. Rooms derive their own errors from these two.
"""

from __future__ import annotations


class AgentoptError(Exception):
    """Base of every error agentopt raises on purpose."""

    exit_code = 1


class UserError(AgentoptError):
    """Bad input: the message is one clear sentence, shown without a stack trace; exit code 2."""

    exit_code = 2


class RunError(AgentoptError):
    """A run that started and could not finish; exit code 1."""

    exit_code = 1
