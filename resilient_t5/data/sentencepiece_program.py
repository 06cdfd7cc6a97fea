"""The program that trains a SentencePiece model; `sentencepiece_training` runs it as a script, so it imports nothing of ours.

stdin: the trainer's options as a line of JSON, then the text, line by line. stdout: the model. What the trainer refuses
goes to stderr in its own words, with exit code 1.
"""

import io
import json
import signal
import sys

import sentencepiece


def main() -> int:
    """Read all of stdin, train, write the model."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; whoever started this one ends it
    options, *lines = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").split("\n")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **json.loads(options))
    except RuntimeError as error:
        sys.stderr.write(str(error))
        return 1
    sys.stdout.buffer.write(model.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
