"""The functions that lab_questions.yaml names."""

from PIL import Image


def picture(doc):
    return [Image.open(doc["picture"]).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def is_right(doc, results):
    return {"right": float(results[0] == doc["answer"])}
