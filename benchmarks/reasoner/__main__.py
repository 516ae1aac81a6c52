"""``pmkvq bench reasoner`` trains the bundled model again."""

from benchmarks.reasoner.train import main

if __name__ == "__main__":
    raise SystemExit(main())
