"""
Run by `test_loading.py` in a process of its own: load a checkpoint in every way that transformers knows, predict with
what came, and print a report of each revision as JSON. Standard input is JSON too: the arguments of `load`, but a list
of `revisions` instead of one.
"""

import json
import sys


def load(package: bool, source: str, stars: list[dict], bundled: bool = False, revision: str | None = None) -> dict:
    """
    Parameters
    ----------
    package : bool
        Whether the process has the package, or only the code in the checkpoint.
    source : str
        Folder, repository, or with `bundled` the name of a bundled checkpoint.
    stars : list of dict
        Rows in the project's schema.
    """
    kwargs: dict = {} if revision is None else {"revision": revision}
    if package:
        import spectrafm_hf

        if bundled:
            source = spectrafm_hf.bundled(source)
    else:
        # What Python itself does with a module that is not there, also where the package happens to be installed.
        sys.modules["spectrafm_hf"] = None  # type: ignore[assignment]
        try:
            import spectrafm_hf
        except ImportError:
            pass
        else:
            raise AssertionError("this process was to run without the package")
        kwargs["trust_remote_code"] = True

    import transformers

    loaded = {
        auto_class: getattr(transformers, auto_class).from_pretrained(source, **kwargs)
        for auto_class in (
            "AutoConfig",
            "AutoModel",
            "AutoModelForTimeSeriesPrediction",
            "AutoTokenizer",
            "AutoProcessor",
            "AutoFeatureExtractor",
        )
    }
    inputs = loaded["AutoTokenizer"](stars)
    model = loaded["AutoModelForTimeSeriesPrediction"]
    outputs = model(**inputs)
    hidden = loaded["AutoModel"](**inputs).last_hidden_state
    assert hidden.equal(model.model(**inputs).last_hidden_state), "AutoModel has other weights"
    pipeline = transformers.pipeline("stellar-labels", model=source, device="cpu", **kwargs)
    report = {
        "classes": {auto_class: type(thing).__name__ for auto_class, thing in loaded.items()},
        "from_package": {auto_class: type(thing).__module__.split(".")[0] for auto_class, thing in loaded.items()},
        "pipeline_from": type(pipeline).__module__.split(".")[0],
        "values": outputs.predictions.tolist(),
        "errors": outputs.prediction_errors.tolist(),
        "pipeline": pipeline(stars, batch_size=2),
    }
    if package:
        model, tokenizer = spectrafm_hf.load_checkpoint(source, **kwargs)
        report["load_checkpoint"] = model(**tokenizer(stars)).predictions.tolist()
    else:
        # What came from the hub can be saved again, whole: code, pipeline and all.
        model.save_pretrained("saved-again")
        loaded["AutoTokenizer"].save_pretrained("saved-again")
    return report


if __name__ == "__main__":
    arguments = json.loads(sys.stdin.read())
    revisions = arguments.pop("revisions")
    print(json.dumps([load(revision=revision, **arguments) for revision in revisions]))
