# SPDX-License-Identifier: Apache-2.0
"""llama-server of the package xllamacpp, which has no command of its own. It serves until it is ended.

    python -m refmoe.engines.server.llama_server MODEL.gguf PORT [cache=f32|f16|bf16] [flash=off|on] [slots=N] [batch=N]

By default its cache is float32 and flash attention is off, as the policy llama.cpp-float32 has it. A prompt is computed
in chunks of at most `batch` tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from refmoe.errors import InputError, require

OPTIONS = {"cache": ("f32", "f16", "bf16"), "flash": ("off", "on"), "slots": tuple(map(str, range(1, 65))),
           "batch": tuple(map(str, range(512, 0, -1)))}  # fmt: skip
"""The options and the values that each takes, the default first."""
PORTS = range(1, 1 << 16)
CONTEXT = 4096
"""Tokens that the cache of all slots holds."""


def serve(path: str, port: int, options: dict[str, str]) -> Any:
    """Start the server, in threads of this process. Raises InputError when the package is not installed.

    options: as `OPTIONS` has them
    """
    x: Any = require("xllamacpp", "llama-cpp", "this server")
    kinds = {name: getattr(x.ggml_type, f"GGML_TYPE_{name.upper()}") for name in OPTIONS["cache"]}
    flash = "ENABLED" if options["flash"] == "on" else "DISABLED"
    params = x.CommonParams()
    params.model.path = path
    params.port = port
    params.n_batch = params.n_ubatch = int(options["batch"])
    params.n_ctx, params.n_parallel = CONTEXT, int(options["slots"])
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = kinds[options["cache"]]
    params.flash_attn_type = getattr(x.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return x.Server(params)


def main(arguments: Sequence[str]) -> None:
    """``python -m refmoe.engines.server.llama_server``"""
    usage = f"usage: llama_server MODEL.gguf PORT {' '.join(f'[{name}={_takes(name)}]' for name in OPTIONS)}"
    if len(arguments) < 2 or not arguments[1].isdigit() or int(arguments[1]) not in PORTS:
        sys.exit(usage)
    given = dict(each.partition("=")[::2] for each in arguments[2:])
    if any(value not in OPTIONS.get(name, ()) for name, value in given.items()):
        sys.exit(usage)
    try:
        server = serve(arguments[0], int(arguments[1]), {name: given.get(name, OPTIONS[name][0]) for name in OPTIONS})
    except InputError as error:
        sys.exit(str(error))
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        time.sleep(1)


def _takes(name: str) -> str:
    """The values of an option in words."""
    values = OPTIONS[name]
    return "|".join(values) if len(values) < 4 else f"{values[0]} to {values[-1]}"


if __name__ == "__main__":
    main(sys.argv[1:])
