/** Elements made without markup: what a name holds is text, whatever it is. */

type Child = Node | string | null | undefined | false
type Attributes = Record<string, string | number | boolean | null | undefined | ((event: never) => void)>

/** An element. Attributes that are functions listen to events; `class` and `aria-…` are as in HTML. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag)
  apply(element, attributes)
  add(element, children)
  return element
}

/** An element of SVG. */
export function s<K extends keyof SVGElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): SVGElementTagNameMap[K] {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag)
  apply(element, attributes)
  add(element, children)
  return element
}

function apply(element: Element, attributes: Attributes): void {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(key, value as EventListener)
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(key, value === true ? '' : String(value))
    }
  }
}

function add(element: Element, children: Child[]): void {
  for (const child of children) {
    if (child !== null && child !== undefined && child !== false) element.append(isolated(child))
  }
}

/** A text without the characters that would reorder or hide what stands around it. */
export function visible(text: string): string {
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu, (char) => {
    const code = char.codePointAt(0)!
    return code < 256 ? `\\x${code.toString(16).padStart(2, '0')}` : `\\u${code.toString(16).padStart(4, '0')}`
  })
}

function isolated(child: Node | string): Node | string {
  return typeof child === 'string' ? visible(child) : child
}

/** Replaces all children. */
export function fill(element: Element, ...children: Child[]): void {
  element.replaceChildren()
  add(element, children)
}

/** Calls a function whenever an element has become wider or narrower. */
export function onWidth(element: Element, changed: () => void): void {
  let width = element.clientWidth
  new ResizeObserver(() => {
    if (Math.abs(element.clientWidth - width) <= 2) return
    width = element.clientWidth
    changed()
  }).observe(element)
}

/** A group of buttons of which one is pressed. */
export function choice<T extends string>(
  label: string,
  options: [T, string][],
  current: T,
  choose: (value: T) => void,
): HTMLElement & { set(value: T): void } {
  const buttons = options.map(([value, text]) =>
    h('button', { type: 'button', 'aria-pressed': String(value === current), 'data-value': value, click: () => {
      group.set(value)
      choose(value)
    } }, text),
  )
  const group = h('div', { class: 'choice', role: 'group', 'aria-label': label }, ...buttons) as unknown as HTMLElement & {
    set(value: T): void
  }
  group.set = (value) => {
    for (const button of buttons) button.setAttribute('aria-pressed', String(button.dataset.value === value))
  }
  return group
}
