"""Compressed models in torch and timm alone.

dcvit builds its models with these modules, and only replaces the blocks' MLP by a faster one. Every saved folder has a
file made of them (`dcvit.models.standalone`), so that a model also loads where dcvit is not installed. Of dcvit they
therefore import nothing but each other.
"""
