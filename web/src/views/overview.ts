/** The overview: how much there is, of which types, and what to look at. */
import { wordColour } from '../colour'
import { fill, h } from '../dom'
import { bytes, count, human, number, plural, share } from '../format'
import type { Model } from '../model'
import type { Finding, Source } from '../payload'
import type { Steps } from '../steps'
import type { State } from '../state'
import { loggedCurves } from './curves'

const SHOWN = 6

export function overview(state: State, root: HTMLElement): void {
  const { model } = state
  fill(
    root,
    h('div', { class: 'headline' }, ...(model.other ? comparison(model) : figures(model))),
    types(state),
    loggedCurves(state),
    h('div', { class: 'columns' }, findings(state), about(model)),
  )
}

function figure(value: string, label: string, detail: string): HTMLElement {
  return h('div', { class: 'figure' }, h('div', { class: 'value' }, value), h('div', { class: 'label' }, label), h('div', { class: 'detail' }, detail))
}

function figures(model: Model): HTMLElement[] {
  const { numel, nbytes, tensors } = model.source
  const found = [
    figure(human(numel), 'parameters', count(numel)),
    model.over ? steps(model.over) : figure(bytes(nbytes), 'stored', `${number(numel ? (8 * nbytes) / numel : NaN)} bits per weight`),
    figure(count(tensors), tensors === 1 ? 'tensor' : 'tensors', layersOf(model)),
  ]
  if (model.grad.words.some((word) => word !== null)) {
    let trainable = 0
    for (let row = 0; row < model.size; row++) if (model.grad.at(row) === true) trainable += model.numel[row]
    found.push(figure(share(numel ? trainable / numel : NaN), 'trainable', `${count(trainable)} parameters`))
  }
  return found
}

function steps({ steps }: Steps): HTMLElement {
  const span = steps.length > 1 ? `${count(steps[0])} to ${count(steps[steps.length - 1])}` : steps.length ? count(steps[0]) : ''
  return figure(count(steps.length), steps.length === 1 ? 'step' : 'steps', span)
}

function layersOf(model: Model): string {
  const stacks = model.stacks.filter((stack) => stack.numbered)
  if (!stacks.length) return 'no numbered layers'
  const layers = stacks.reduce((sum, stack) => sum + stack.layers.length, 0)
  return `${plural(layers, 'layer')} in ${plural(stacks.length, 'stack')}`
}

function comparison(model: Model): HTMLElement[] {
  const status = model.status!
  const counts = new Map<string, number>()
  let norm = 0
  let error = 0
  let compared = 0
  let changed = 0
  for (let row = 0; row < model.size; row++) {
    const word = status.at(row)
    counts.set(word, (counts.get(word) ?? 0) + 1)
    const relative = model.difference!.get('relative')[row]
    const l2 = model.a.get('l2')[row]
    changed += model.difference!.get('changed')[row]
    if (word === 'changed' || word === 'equal' || word === 'identical') {
      compared += model.numel[row]
      if (Number.isFinite(relative) && Number.isFinite(l2)) {
        norm += l2 * l2
        error += (relative * l2) ** 2
      }
    }
  }
  const same = (counts.get('identical') ?? 0) + (counts.get('equal') ?? 0)
  const apart = model.size - same - (counts.get('changed') ?? 0)
  const relative = Math.sqrt(error / norm)
  const found = [
    figure(count(counts.get('changed') ?? 0), 'tensors changed', `${count(same)} the same · ${count(apart)} not comparable`),
    figure(share(compared ? changed / compared : NaN), 'of the values changed', `${human(changed)} of ${human(compared)}`),
    figure(number(relative), 'relative L2', '‖B − A‖ / ‖A‖ over all that was compared'),
    figure(relative > 0 ? `${number(-20 * Math.log10(relative))} dB` : '∞', 'SQNR', 'signal to noise of B as A quantised'),
    figure(bytes(model.other!.nbytes), 'stored in B', `${bytes(model.source.nbytes)} in A`),
  ]
  return found
}

/** A bar of the bytes of each type, and what the colours mean. */
function types(state: State): HTMLElement {
  const { model } = state
  const sizes = new Map<string, { nbytes: number; numel: number; tensors: number; encoded: boolean }>()
  for (let row = 0; row < model.size; row++) {
    const word = model.typeOf(row)
    const known = sizes.get(word) ?? { nbytes: 0, numel: 0, tensors: 0, encoded: model.encodingOf(row) !== null }
    known.nbytes += model.nbytes[row]
    known.numel += model.numel[row]
    known.tensors += 1
    sizes.set(word, known)
  }
  const sorted = [...sizes].sort((x, y) => y[1].nbytes - x[1].nbytes)
  const total = sorted.reduce((sum, [, { nbytes }]) => sum + nbytes, 0) || 1
  const bar = h('div', { class: 'types-bar', 'aria-hidden': 'true' })
  const legend = h('ul', { class: 'types-legend' })
  sorted.forEach(([word, { nbytes, numel, tensors, encoded }], i) => {
    const piece = h('span')
    piece.style.flexGrow = String(Math.max(nbytes / total, 0.002))
    piece.style.background = wordColour(i)
    bar.append(piece)
    const swatch = h('i', { class: 'swatch' })
    swatch.style.background = wordColour(i)
    legend.append(
      h('li', {}, h('button', { type: 'button', title: 'Select these', click: () => state.select(encoded ? `[encoding=${word}]` : `[dtype=${word}] & ~:quantized`) },
        swatch, h('b', {}, word),
        ` ${bytes(nbytes)} · ${share(nbytes / total)} · ${plural(tensors, 'tensor')} · ${number(numel ? (8 * nbytes) / numel : NaN)} bits per weight`)),
    )
  })
  return h('div', { class: 'types' }, sorted.length > 1 ? bar : null, legend)
}

function findings(state: State): HTMLElement {
  const { findings } = state.model
  const total = findings.length
  return h(
    'div',
    { class: 'findings' },
    h('h3', {}, 'To look at', h('span', { class: 'badge' }, total ? count(total) : 'nothing')),
    total
      ? null
      : h('p', { class: 'calm' }, calm(state.model)),
    ...findings.map((finding, i) => findingCard(state, finding, i < 4)),
  )
}

function calm(model: Model): string {
  if (!model.over) return 'No NaN or infinities, no constant matrices, no saturated tensors, no scale far from its siblings.'
  return model.source.format === 'record' ? 'The watchdogs of the recorder found nothing.' : 'Only a record has findings; this is a history of checkpoints.'
}

function findingCard(state: State, finding: Finding, open: boolean): HTMLElement {
  const { model } = state
  const list = h('ul', { class: 'finding-items' })
  const draw = (most: number) => {
    fill(
      list,
      ...finding.items.slice(0, most).map(([row, reason, step]) => {
        const open = () => {
          if (step !== undefined && model.over) state.go(model.over.placeOf(step))
          state.show(row)
        }
        const text = step === undefined ? reason : `step ${count(step)}: ${reason}`
        return h('li', {}, h('button', { type: 'button', class: 'name-link', 'data-name': model.names[row], click: open }, model.names[row]), text ? h('span', {}, ` ${text}`) : null)
      }),
      ...(finding.names ?? []).slice(0, most).map((name) => h('li', {}, h('code', {}, name))),
      finding.items.length > most
        ? h('li', {}, h('button', { type: 'button', class: 'more', click: () => draw(finding.items.length) }, `Show all ${count(finding.items.length)}`))
        : null,
      finding.count > finding.items.length + (finding.names?.length ?? 0) && most >= finding.items.length
        ? h('li', {}, `${count(finding.count - finding.items.length - (finding.names?.length ?? 0))} more are not listed`)
        : null,
    )
  }
  draw(SHOWN)
  return h(
    'details',
    { class: `finding ${finding.severity}`, open },
    h('summary', {}, h('span', { class: 'severity' }, finding.severity), h('span', { class: 'finding-title' }, finding.title), h('span', { class: 'count' }, finding.from === 'audit' ? finding.id : plural(finding.count, 'tensor'))),
    finding.what ? h('p', {}, finding.what) : null,
    finding.why ? h('p', { class: 'why' }, finding.why) : null,
    finding.fix ? h('pre', {}, finding.fix) : null,
    list,
  )
}

function about(model: Model): HTMLElement {
  const parts: HTMLElement[] = [sourceBlock(model.other ? 'A' : 'Source', model.source)]
  if (model.other) parts.push(sourceBlock('B', model.other))
  if (model.payload.rename) parts.push(h('p', { class: 'note' }, `Names of B are renamed: ${model.payload.rename}`))
  for (const note of model.over?.form.notes ?? []) parts.push(h('p', { class: 'note' }, note))
  const unread = Object.entries(model.payload.unread)
  if (unread.length) {
    parts.push(
      h('details', { class: 'finding note' }, h('summary', {}, `Not read: ${plural(unread.length, 'tensor')}`),
        h('ul', { class: 'finding-items' }, ...unread.slice(0, 200).map(([row, reason]) => h('li', {}, h('code', {}, model.names[Number(row)]), ` ${reason}`)))),
    )
  }
  if (!model.source.detailed) {
    parts.push(h('p', { class: 'note' }, 'More than 5,000 tensors: histograms have 12 intervals, counts by power of two are left out, and so is the kurtosis of small tensors.'))
  }
  return h('div', { class: 'about' }, ...parts)
}

function sourceBlock(title: string, source: Source): HTMLElement {
  const facts: [string, string][] = [['from', source.label], ['format', source.format]]
  if (source.selector) facts.push(['selected', source.selector])
  if (source.lost) facts.push(['casts', `lost something in ${plural(source.lost, 'tensor')}`])
  return h(
    'div',
    {},
    h('h3', {}, title),
    h('dl', { class: 'facts wide' }, ...facts.flatMap(([label, value]) => [h('dt', {}, label), h('dd', {}, value)])),
    source.metadata.length
      ? h('details', { class: 'metadata', open: source.metadata.length <= 6 }, h('summary', {}, `Metadata: ${plural(source.metadata.length, 'entry', 'entries')}`),
          h('dl', { class: 'facts wide' }, ...source.metadata.flatMap(([key, value]) => [h('dt', {}, key), h('dd', {}, value)])))
      : null,
    source.left_out.length
      ? h('details', { class: 'finding warning' }, h('summary', {}, `State outside the table: ${count(source.left_out.length)}`),
          h('ul', { class: 'finding-items' }, ...source.left_out.slice(0, 200).map((each) => h('li', {}, h('code', {}, each.name || '(top level)'), ` ${each.kind} ${each.reason}`))))
      : null,
  )
}
