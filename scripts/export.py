"""Take a policy elsewhere: python scripts/export.py run=runs/ppo-HalfCheetah/... format=onnx"""

from pgsuite.export.command import main

if __name__ == "__main__":
    main()
