"""`import shunter` needs torch and nothing else."""

import subprocess
import sys

from tests.helpers import TIME_LIMIT


def test_importing_the_library_imports_no_extra():
    code = (
        "import sys; sys.modules['triton'] = None; "  # as if it were not installed; torch itself looks for it
        "import shunter; shunter.MoE(4, 4, 2, 'topk'); "
        "extras = {'transformers', 'pydantic', 'matplotlib', 'datasets', 'yaml', 'tokenizers', 'scipy', 'jinja2'}; "
        "sys.exit(', '.join(extras & set(sys.modules)) or 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=TIME_LIMIT
    )
    assert found.returncode == 0, found.stderr
