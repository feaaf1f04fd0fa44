"""``python -m quarot_onnx``: the same as ``quarot-onnx``."""

from quarot_onnx.cli import main

if __name__ == "__main__":
    main()
