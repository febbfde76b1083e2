"""The command `pipeline`, and `python -m pipeline`, also under torchrun."""

import sys

from pipeline.system import interrupt


def main() -> int:
    """Run the command of this process; returns the exit code, 130 after Ctrl-C."""
    interrupt.install()
    try:
        from pipeline import cli  # here, because it loads for a while

        code = cli.main()
    except BaseException:
        if interrupt.pressed():
            interrupt.leave()
        raise
    if interrupt.pressed():
        interrupt.leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
