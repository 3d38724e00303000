# Puts llama.cpp's converter, which no wheel has, into the environment $1: it is part of the sources
# of llama-cpp-python, which are not built.
set -e
"$1/bin/python" -m pip --disable-pip-version-check --no-input download -q --no-deps \
	--no-binary llama-cpp-python -d "$1/sources" llama-cpp-python==0.3.36
tar -xzf "$1"/sources/llama_cpp_python-0.3.36.tar.gz -C "$1" --strip-components=2 \
	llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py \
	llama_cpp_python-0.3.36/vendor/llama.cpp/conversion \
	llama_cpp_python-0.3.36/vendor/llama.cpp/gguf-py
rm -r "$1/sources"
