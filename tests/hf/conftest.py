"""What holds for tests of models of transformers: none without it, and nothing of the caller's settings is left."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
