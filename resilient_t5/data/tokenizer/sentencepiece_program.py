"""The program that trains a SentencePiece model; `sentencepiece.py` runs it as a script, so it imports nothing of ours.

stdin: the trainer's options as a line of JSON, then the text, line by line. stdout: the model. What the trainer refuses
goes to stderr in its own words, with exit code 1. The argument is the process that wants the model: without it, this ends.
"""

import io
import json
import os
import signal
import sys
import threading
import time

import sentencepiece

LOOK_EVERY_S = 1.0


def main() -> int:
    """Read all of stdin, train, write the model."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; whoever started this one ends it
    threading.Thread(target=end_without, args=(int(sys.argv[1]),), daemon=True).start()
    options, *lines = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").split("\n")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **json.loads(options))
    except RuntimeError as error:
        sys.stderr.write(str(error))
        return 1
    sys.stdout.buffer.write(model.getvalue())
    return 0


def end_without(parent: int) -> None:
    """End this process once `parent` is gone: killed, it can end nobody, and what is trained here would be for nobody."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
