"""
Run by `test_loading.py` in a process without the package: load checkpoints one after the other, with the code that each
carries, and print as JSON what each answered. Standard input is JSON: a list of `folders`, and `stars`.
"""

import json
import sys


def load(folder: str, stars: list[dict]) -> dict:
    import transformers

    how = {"trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
    model = transformers.AutoModelForTimeSeriesPrediction.from_pretrained(folder, **how)
    pipeline = transformers.pipeline("stellar-labels", model=folder, device="cpu", **how)
    bare = transformers.AutoModel.from_pretrained(folder, **how)
    inputs = tokenizer(stars)
    return {
        "versions": [sys.modules[type(each.config).__module__].PACKAGE_VERSION for each in (model, bare)],
        "values": model(**inputs).predictions.tolist(),
        "pixels": inputs["attention_mask"].sum(dim=1).tolist(),
        "pipeline": [star["teff"] for star in pipeline(stars)],
        "object_id": [star["object_id"] for star in pipeline(stars)],
    }


if __name__ == "__main__":
    sys.modules["spectrafm_hf"] = None  # type: ignore[assignment]  # also where it happens to be installed
    request = json.loads(sys.stdin.read())
    print(json.dumps([load(folder, request["stars"]) for folder in request["folders"]]))
