"""Make .venv-trl, an environment of its own with TRL at the versions of constraints.txt. Standard library only.

As for .venv, the stamp is written last: an environment whose making was interrupted is made anew.
"""

import hashlib
import shutil
import sys
from pathlib import Path

from jobs import CHECKOUT, JobError

sys.path.insert(0, str(CHECKOUT / "scripts"))
import make_venv

VENV = CHECKOUT / ".venv-trl"
REQUIREMENTS = ["trl==1.16.0", "torch==2.13.0"]


def trl_python() -> Path:
    """The Python of an environment with TRL, made if need be (a minute or two)."""
    stamp, log = VENV / "made_for.txt", CHECKOUT / ".venv-trl" / "making.log"
    constraints = CHECKOUT / "constraints.txt"
    wanted = hashlib.sha256(
        f"{REQUIREMENTS} {sys.version} {CHECKOUT} {constraints.read_text()}".encode()
    ).hexdigest()
    python = VENV / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    sys.stderr.write(f"making .venv-trl with {' '.join(REQUIREMENTS)}; log: {log}\n")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    (VENV / ".gitignore").write_text("*\n")
    try:
        make_venv.run([sys.executable, "-m", "venv", VENV], log)
        install = [python, "-m", "pip", "install", "--constraint", constraints, *REQUIREMENTS]
        make_venv.run(install, log)
        make_venv.run([python, "-c", "from trl import GRPOTrainer"], log)
    except make_venv.SetupError as error:
        raise JobError(str(error)) from error
    stamp.write_text(wanted)
    return python
