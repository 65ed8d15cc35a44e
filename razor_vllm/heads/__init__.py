"""Which KV heads of a model retrieve: finding them, and the file that says so.

Needs torch and transformers, never vLLM, so heads can be found where nothing is served.

    profile     razor_profile.json: what it holds, where it is looked for
    calibrate   scores by a probe, run by transformers, and the choice
    alibi       the bound on what the heads of an ALiBi model can see, from its weights
    convert     patterns that others have published, into profiles and out again
"""
