"""The command `pipeline`, and `python -m pipeline`, also under torchrun."""

import sys

from pipeline.system import interrupt


def main() -> int:
    """Run the command of this process; returns the exit code, 130 after Ctrl-C."""
    if sys.platform != "linux":  # before anything is imported that no other system has
        way = "run it in WSL 2, a container or a virtual machine"
        print(f"error: this runs on Linux only; found {sys.platform}, expected linux; fix: {way}", file=sys.stderr)
        return 2
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
