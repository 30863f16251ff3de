"""Pipelines: agents written as data, so that an optimizer can change their structure as well as their words.

`Pipeline` runs a pipeline parameter node by node; `load_agents_config` reads one from `solution.json` files.
"""

from __future__ import annotations

from agentopt.pipelines._import import ImportedAgents, ImportNote, load_agents, load_agents_config
from agentopt.pipelines._run import Pipeline

__all__ = ["ImportNote", "ImportedAgents", "Pipeline", "load_agents", "load_agents_config"]
