"""`dtrain verify`: one job under every strategy, trainer and launcher; is it the same training?"""
