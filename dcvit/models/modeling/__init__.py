"""Compressed models that need only torch and timm.

dcvit builds its models with these modules. Every saved folder has a file made of them (`dcvit.models.standalone`), so
that a model also loads where dcvit is not installed. From dcvit they therefore import only each other.
"""
