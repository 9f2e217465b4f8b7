// The Open Inference Protocol, as KServe and Triton speak it: the same samples by their noise and by their address.
//
//   node infer.js ADDRESS OUT [MODEL [SEED [START [COUNT]]]]

import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { promisify } from 'node:util';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

import { draw } from '../../serve/server/http/page/noise.mjs';

const PROTOS = process.env.PROTOS ?? path.join(import.meta.dirname, '../../protos');

// keepCase: the names as the protocol has them, raw_output_contents and not rawOutputContents.
const { inference } = grpc.loadPackageDefinition(
  protoLoader.loadSync(path.join(PROTOS, 'inference/inference.proto'), { keepCase: true, longs: String }),
);

const [address, out, model = 'faces', seed = '7', start = '100', count = '5'] = process.argv.slice(2);
if (!out) {
  console.error('usage: node infer.js ADDRESS OUT [MODEL [SEED [START [COUNT]]]]');
  process.exit(2);
}
await mkdir(out, { recursive: true });
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());
// Every call with a deadline: the server then computes nothing that nobody waits for.
const ask = (method, request) => promisify(client[method].bind(client))(request, { deadline: Date.now() + 30_000 });

try {
  // The model says what it takes: noise, FP32 [-1, size]; -1 is the batch.
  const { inputs } = await ask('ModelMetadata', { name: model });
  const size = Number(inputs[0].shape[1]);

  const noise = draw(BigInt(seed), BigInt(start), Number(count), size);
  const byNoise = await ask('ModelInfer', {
    model_name: model,
    inputs: [{ name: 'noise', datatype: 'FP32', shape: [count, String(size)] }],
    raw_input_contents: [Buffer.from(noise.buffer)], // float32, little-endian, as nearly every machine has them
  });

  // No input, only which samples; as text, since a signed parameter has no room for all seeds.
  const byAddress = await ask('ModelInfer', {
    model_name: model,
    parameters: { seed: { string_param: seed }, start: { string_param: start }, count: { string_param: count } },
  });

  const [ours, theirs] = [byNoise, byAddress].map((reply) => reply.raw_output_contents[0]);
  await writeFile(path.join(out, 'noise.bin'), Buffer.from(noise.buffer));
  await writeFile(path.join(out, 'by-noise.bin'), ours);
  await writeFile(path.join(out, 'by-address.bin'), theirs);
  const shape = byAddress.outputs[0].shape.join(' x ');
  console.log(`${shape} values in ${out}; ${ours.equals(theirs) ? 'both are the same' : 'they differ'}`);
} catch (error) {
  console.error(`Error: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
