"""What `import spkfast` costs: torch and numpy, and none of the packages that come with extras."""

import subprocess
import sys

OPTIONAL = {
    *("accelerate", "jsonargparse", "kaldi_native_fbank", "matplotlib", "rich", "safetensors", "sklearn", "soundfile"),
    *("soxr", "tensorboard", "triton", "yaml"),
}


def test_import_pulls_in_nothing_optional(tmp_path):
    # torch itself may load some of them, so only what comes after it counts.
    code = (
        "import sys, numpy, torch; before = set(sys.modules); import spkfast;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "spkfast" in loaded
    assert loaded.isdisjoint(OPTIONAL)
