# The command, and nothing else:  docker build -t refmoe . && docker run --rm --network none -v "$PWD:/work" refmoe cases
FROM python:3.12-slim AS build
COPY pyproject.toml setup.py README.md LICENSE /src/
COPY refmoe /src/refmoe
COPY golden /src/golden
RUN python -m pip wheel --no-cache-dir --wheel-dir /wheels /src

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home refmoe
COPY --from=build /wheels /wheels
RUN python -m pip install --no-cache-dir --no-index --find-links /wheels /wheels/refmoe-*.whl
USER 10001
WORKDIR /work
ENTRYPOINT ["refmoe"]
CMD ["--help"]
