"""``import hf_flash`` before, after and without Transformers, and with a release that is too old."""

import subprocess
import sys


def output(code: str) -> str:
    """What a fresh interpreter prints, warnings and all."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_order_does_not_matter():
    body = (
        "config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)\n"
        "model = transformers.AutoModel.from_config(config, attn_implementation='hf_flash')\n"
        "assert model.config._attn_implementation == 'hf_flash'\n"
    )
    for first in (
        "import hf_flash, sys\nassert 'transformers' not in sys.modules\nimport transformers\n",
        "import transformers, hf_flash\n",
        "import transformers, transformers.modeling_utils, hf_flash\n",
        "import transformers\nfrom hf_flash import patch_model\n",  # imports the modeling code itself
        "import transformers\nfrom hf_flash import FlashAttentionCallback\n",
        "from hf_flash import explain\nimport transformers\n",
    ):
        output(first + body)


ASKS = """
try:
    hf_flash.patch_model
except AttributeError as error:
    print("attribute:", error)
try:
    from hf_flash import patch_model
except ImportError as error:
    print("import:", error)
"""
TOO_OLD = """
import transformers
transformers.__version__ = "4.57.6"
import hf_flash
assert not hasattr(hf_flash, "patch_model")
import transformers.modeling_utils
assert "hf_flash" not in transformers.AttentionInterface._global_mapping
"""


def test_a_release_that_is_too_old():
    """It has the interface, but not all that we rely on there: causal models would see the future."""
    sentence = "transformers >= 5.0 is needed, this is 4.57.6"
    said = output(TOO_OLD + ASKS).splitlines()
    assert f"attribute: {sentence}" in said and f"import: {sentence}" in said
    warning = [line for line in said if "attn_implementation='hf_flash' is not available" in line]
    assert len(warning) == 1 and warning[0].count("transformers >= 5.0") == 1


WITHOUT = """
import sys
sys.modules["transformers"] = None
import inspect
import hf_flash
from hf_flash import *
assert not hasattr(hf_flash, "patch_model") and "patch_model" not in dir(hf_flash)
assert {"flash_attention", "FlashMHA"} <= {name for name, _ in inspect.getmembers(hf_flash)} & globals().keys()
"""


def test_without_transformers():
    sentence = "hf_flash.patch_model needs transformers >= 5.0: pip install 'hf_flash[transformers]'"
    assert output(WITHOUT + ASKS).splitlines() == [f"attribute: {sentence}", f"import: {sentence}"]
    body = "from hf_flash import *\nimport hf_flash\nassert patch_model and 'explain' in dir(hf_flash)\n"
    assert output(body) == ""
