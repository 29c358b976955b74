"""placeholder (being written)"""
