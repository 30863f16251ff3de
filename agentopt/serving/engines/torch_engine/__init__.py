"""Our own OpenAI-compatible server over transformers, where vLLM cannot be had: `engines.transformers_server` runs it.

`_wire` reads requests, `_shapes` has the JSON of replies, `_app` is the HTTP side, `_worker` the thread that owns the
model, `_rows` the batch of running sequences, `_slots` the adapters, `_sampling` picks tokens, `_text` turns them into
text and finds stop strings, `_structured` keeps a reply within a JSON schema. Importing this loads no torch.
"""
