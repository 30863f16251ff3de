"""One model on several machines with Ray Serve LLM; agentopt's gateway goes in front of it.

    ray start --head                                  # and `ray start --address=HEAD:6379` on the other machines
    MODEL=/models/model-rf8 python docker/ray/serve_llm.py
    agentopt serve --upstream http://127.0.0.1:8100 --keys keys.db

agentopt has to be installed wherever a replica may run (the image of gpu.Dockerfile, with `pip install ray[llm]` of the
release that goes with its vLLM): vLLM finds the plug-in for quantized folders by its entry point, in every worker.
"""

from __future__ import annotations

import os
from typing import Any

PORT = 8100
"""Of Ray Serve, on loopback: it has no keys of its own."""


def options(environ: dict[str, str]) -> dict[str, Any]:
    """`LLMConfig` as keyword arguments, from MODEL, MODEL_NAME, ADAPTERS, GPUS, REPLICAS and ACCELERATOR.

    ADAPTERS is a folder in object storage (s3://, gs://, abfss:// or azure://) with a folder for each adapter; a
    client asks for `NAME:ADAPTER`. Ray Serve loads no adapters from local disks.
    """
    given: dict[str, Any] = {
        "model_loading_config": {
            "model_id": environ.get("MODEL_NAME", "model"),
            "model_source": environ["MODEL"],
        },
        "engine_kwargs": {
            "tensor_parallel_size": int(environ.get("GPUS", "1")),
            "gpu_memory_utilization": 0.9,
            "max_model_len": 16384,
        },
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": int(environ.get("REPLICAS", "4")),
                "target_ongoing_requests": 32,
            }
        },
        "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}},
    }
    if environ.get("ACCELERATOR"):
        given["accelerator_type"] = environ["ACCELERATOR"]
    if environ.get("ADAPTERS"):
        given["engine_kwargs"] |= {"enable_lora": True, "max_lora_rank": 64, "max_loras": 8}
        given["lora_config"] = {"dynamic_lora_loading_path": environ["ADAPTERS"], "max_num_adapters_per_replica": 8}
    return given


def main() -> None:
    """Deploy, and stay until interrupted."""
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(build_openai_app({"llm_configs": [LLMConfig(**options(dict(os.environ)))]}), blocking=True)


if __name__ == "__main__":
    main()
