"""Published models that read radiology reports: RadGraph's annotator and the CheXbert labeler.

A room of its own because both sides want them: `metrics` scores by what they find, `supervision` tags by it.
"""
