"""Take a policy elsewhere: python scripts/export.py run=runs/ppo-HalfCheetah/... format=onnx"""

from pgsuite.runtime import cli
from pgsuite.runtime.export import export

if __name__ == "__main__":
    cli.main(export, "export")
