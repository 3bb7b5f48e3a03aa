"""Take a policy elsewhere: python scripts/export.py run=runs/ppo-HalfCheetah/... format=onnx"""

from pgsuite.app import cli
from pgsuite.app.export import export

if __name__ == "__main__":
    cli.main(export, "export")
