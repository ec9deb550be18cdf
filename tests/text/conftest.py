# SPDX-License-Identifier: Apache-2.0
"""The real tokenizers, which mistral-common ships: V1 is Mixtral 8x7B's, V3 is Mixtral 8x22B Instruct's."""

from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from refmoe.text.tokenizer import Tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": DATA / "tokenizer.model.v1", "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3"}


@pytest.fixture(scope="session")
def v1_file() -> Path:
    return FILES["v1"]


@pytest.fixture(scope="session")
def v7_file() -> Path:
    """A tokenizer of a later model than Mixtral, with another template."""
    return DATA / "mistral_instruct_tokenizer_241114.model.v7"


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    return {version: Tokenizer.load(path) for version, path in FILES.items()}


@pytest.fixture(scope="session", params=["v1", "v3"])
def version(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer(tokenizers, version) -> Tokenizer:
    return tokenizers[version]


@pytest.fixture(scope="session")
def v1(tokenizers) -> Tokenizer:
    return tokenizers["v1"]


@pytest.fixture(scope="session")
def v3(tokenizers) -> Tokenizer:
    return tokenizers["v3"]


@pytest.fixture(scope="session")
def mistral(version) -> MistralTokenizer:
    """mistral-common's own tokenizer over the same file."""
    return MistralTokenizer.from_file(str(FILES[version]), mode=ValidationMode.test)
