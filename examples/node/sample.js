// Write samples as PNGs as they come, whatever happens to the connection.
//
//   node sample.js ADDRESS OUT [SEED [START [COUNT]]]
//
// Sample i of a seed is the same picture whoever makes it, so a failed call needs no bookkeeping but the next index.

import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTOS = process.env.PROTOS ?? path.join(import.meta.dirname, '../../protos');
const PATIENCE = 60_000; // milliseconds without a sample after which it gives up
const [FIRST_PAUSE, LONGEST_PAUSE] = [100, 5_000];

const { balancedvae } = grpc.loadPackageDefinition(
  protoLoader.loadSync(path.join(PROTOS, 'balancedvae/sampling/v1/sampling.proto')),
);

/** Yields { index, png } for samples start to end - 1, BigInts, of a seed. */
async function* samples(client, seed, start, end) {
  let [at, version, pause, failing] = [start, '', FIRST_PAUSE, Date.now()];
  for (;;) {
    // 64-bit numbers go in as text: JavaScript's own numbers have 53 bits.
    const range = { seed, start: String(at), count: String(end - at), version, encoding: 'ENCODING_PNG' };
    const call = client.SampleStream({ range });
    try {
      // What is not read yet is not drawn yet: gRPC's flow control reaches from this loop to the server's engine.
      for await (const { chunk } of call) {
        version = chunk.digest; // from now on this very model or NOT_FOUND, never another's pictures
        for (const png of chunk.files) {
          yield { index: at, png };
          at += 1n;
        }
        [pause, failing] = [FIRST_PAUSE, Date.now()];
      }
      return;
    } catch (error) {
      const wait = delay(error, pause);
      if (wait === null || Date.now() + wait - failing > PATIENCE) throw error;
      console.error(`${error.details}; again from ${at} in ${Math.round(wait)} ms`);
      await sleep(wait);
      pause = Math.min(2 * pause, LONGEST_PAUSE);
    } finally {
      call.cancel(); // for whoever stops reading early; a call that has ended does not mind
    }
  }
}

/** How many milliseconds to wait before asking again; null where that would not help. */
function delay(error, pause) {
  // A server that is full says when to come back: google.rpc.RetryInfo, and in this trailer the same as a plain number.
  const [pushback] = error.metadata?.get('grpc-retry-pushback-ms') ?? [];
  const broken = [grpc.status.UNAVAILABLE, grpc.status.CANCELLED].includes(error.code);
  if (pushback === undefined && !broken) return null;
  return Math.max(FIRST_PAUSE, Number(pushback ?? pause)) * (1 + Math.random() / 4); // or all come back at once
}

const [address, out, seed = '7', start = '100', count = '20'] = process.argv.slice(2);
if (!out) {
  console.error('usage: node sample.js ADDRESS OUT [SEED [START [COUNT]]]');
  process.exit(2);
}
await mkdir(out, { recursive: true });
const client = new balancedvae.sampling.v1.SamplingService(address, grpc.credentials.createInsecure());
try {
  for await (const { index, png } of samples(client, seed, BigInt(start), BigInt(start) + BigInt(count))) {
    await writeFile(path.join(out, `${String(index).padStart(9, '0')}.png`), png);
  }
  console.log(`${count} samples of seed ${seed} in ${out}`);
} catch (error) {
  console.error(`Error: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
