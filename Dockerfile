# CPU image of `fusionsam serve`; its steps are the README's. docs/how-to/serve.md shows how to build and run it.
FROM python:3.12-slim

WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
# first from PyTorch's own index alone, which has wheels without CUDA, a tenth of the size
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch torchvision
RUN pip install --no-cache-dir ".[serve]"

RUN useradd --create-home fusionsam
USER fusionsam
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
# the list form, so that SIGTERM reaches the server and not a shell
CMD ["fusionsam", "serve", "--host", "0.0.0.0", "--port", "8000"]
