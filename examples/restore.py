"""Restore the gaps of three sentences with an export, first in plain transformers, then through the package.

    python examples/restore.py runs/quickstart/export/best

An export is a directory that transformers loads. The package adds a constrained search: it answers every gap in order,
writes only trained pieces, and returns the probability of each answer.
"""

import re
import sys

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from resilient_t5.restoration.beam_search import DecodeSettings
from resilient_t5.restoration.filler import open_filler
from resilient_t5.restoration.gaps import find_gaps

GAP = "<extra_id_0>"
SENTENCES = (
    f"My uncle, 64, has gout. Drug: {GAP}; dose: 1 mg.",
    f"A woman, 33. Diagnosis: meningitis. Complaint: {GAP}.",
    f"症状“口渴”，数月。诊断：{GAP}。",
)

if __name__ == "__main__":
    directory = sys.argv[1]

    model = AutoModelForSeq2SeqLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for sentence in SENTENCES:
        output = tokenizer.decode(model.generate(tokenizer(sentence, return_tensors="pt").input_ids)[0])
        # T5 answers "<extra_id_0> ANSWER"; the next sentinel or the end token closes the answer.
        answer = re.search(f"{GAP}(.*?)(<extra_id_|</s>|$)", output)
        print("transformers:", sentence.replace(GAP, answer[1].strip() if answer else GAP))

    filler, _ = open_filler(directory)
    restored = filler.fill([(sentence, find_gaps(sentence, [GAP])) for sentence in SENTENCES], DecodeSettings())
    for sentence, (fill,) in zip(SENTENCES, restored or [], strict=True):
        print("resilient_t5:", sentence.replace(GAP, fill.text), f"(probability {fill.probability:.2f})")
