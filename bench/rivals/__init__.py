"""What people run instead, beside ours: llama.cpp, CTranslate2 and torch on the same prompt."""
