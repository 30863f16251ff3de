"""agentopt: record an agent's run as a graph, send feedback backward, keep only edits that are measured to help."""
